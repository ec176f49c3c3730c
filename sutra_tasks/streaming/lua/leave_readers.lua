--- Let other readers have at once the responses that a closing reader did not acknowledge.
---
--- Among them are responses that the server sent and the reader never got. A reader without any is deleted
--- from the group.
---
--- @flags    allow-oom     a reader must be able to close on a full server
--- @key      responses     stream: the output
--- @arg      group         consumer group of the readers
--- @arg      reader        name of the closing reader in the group
--- @constant CLAIMABLE_MS  idle time by which every other reader may claim a response

local pending = redis.pcall('XPENDING', responses, group, '-', '+', 1000, reader)
if pending.err then return end  -- the stream or the group was deleted
if #pending == 0 then
  redis.call('XGROUP', 'DELCONSUMER', responses, group, reader)
  return
end
for _, row in ipairs(pending) do
  redis.call('XCLAIM', responses, group, reader, 0, row[1], 'IDLE', CLAIMABLE_MS, 'JUSTID')
end
