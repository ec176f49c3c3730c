--- Acknowledge responses that a reader has worked on, and delete them.
---
--- @flags    allow-oom     it frees memory: a full server must not refuse it
--- @key      responses     stream: the output
--- @arg      group         consumer group of the readers
--- @args     acknowledged  ids of the responses, at least one

redis.call('XACK', responses, group, unpack(acknowledged))
redis.call('XDEL', responses, unpack(acknowledged))
