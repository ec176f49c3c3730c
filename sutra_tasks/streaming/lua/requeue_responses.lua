--- Requeue the responses that a closing reader did not acknowledge: other readers may claim them at once.
---
--- Among them are responses that the server sent and the reader never received. A reader that has no
--- responses is deleted from the group.
---
--- @flags    allow-oom  a reader must be able to close on a full server
--- @key      responses  stream: the output
--- @arg      reader     name of the closing reader in the group
--- @constant GROUP      the consumer group of the readers

local DAY_MS = 86400000 -- silent for longer than any reader waits before it claims
local from = '-'
while true do
  local pending = redis.pcall('XPENDING', responses, GROUP, from, '+', 1000, reader)
  if pending.err then return end -- the stream or the group was deleted
  for _, row in ipairs(pending) do
    redis.call('XCLAIM', responses, GROUP, reader, 0, row[1], 'IDLE', DAY_MS, 'JUSTID')
    from = '(' .. row[1]
  end
  if #pending < 1000 then break end
end
if from == '-' then redis.call('XGROUP', 'DELCONSUMER', responses, GROUP, reader) end
