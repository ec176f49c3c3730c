--- Tell whether an entry was taken and is not answered.
---
--- A script that answers an entry looks first and removes it last: what the server refuses in between
--- ends the script, and the entry stays.
---
--- @constant GROUP  the consumer group

-- False as well if the stream is gone, or if its key has another type.
local function is_pending(stream, id)
  local found = redis.pcall('XPENDING', stream, GROUP, id, id, 1)
  return not found.err and #found > 0
end

-- Raises if entries of this stream may not be removed: before, and not after, their answer is written.
local function check_rights(stream)
  redis.call('XACK', stream, GROUP, '0-0')
  redis.call('XDEL', stream, '0-0')
end
