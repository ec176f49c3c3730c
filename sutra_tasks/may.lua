--- Find the commands that the server's user may not run; none of them is run.
---
--- @flags    no-writes,allow-stale    a replica, and a full server, can tell as well
--- @args     commands     each command as a JSON array of its words
--- @returns  the numbers of those that are not allowed, the first is 1
local denied = {}
for number, command in ipairs(commands) do
  if not redis.acl_check_cmd(unpack(cjson.decode(command))) then
    denied[#denied + 1] = number
  end
end
return denied
