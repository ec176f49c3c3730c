--- Acknowledge responses that a reader has worked on, and delete them.
---
--- @flags    allow-oom  it frees memory: a full server must not refuse it
--- @key      responses  stream: the output
--- @args     ids        ids of the responses, at least one
--- @constant GROUP      the consumer group of the readers

redis.call('XACK', responses, GROUP, unpack(ids))
redis.call('XDEL', responses, unpack(ids))
