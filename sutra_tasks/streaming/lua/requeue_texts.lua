--- Requeue open texts: any consumer may take them at once, and this take is not counted.
---
--- @flags    allow-oom   workers free memory: a full server must not refuse them
--- @key      takeable    sorted set: key of an open text -> when it may be taken, ms
--- @keys     texts       hashes: the texts
--- @args     names       the keys of the texts
--- @args     tokens      the tokens with which they were taken; a text with another token is left alone
--- @include  streaming/lua/clock

local now = now_ms()
for i, text in ipairs(texts) do
  if redis.call('HGET', text, 'token') == tokens[i] then
    redis.call('HDEL', text, 'token')
    redis.call('HINCRBY', text, 'attempts', -1)
    redis.call('ZADD', takeable, 'XX', now, names[i])
  end
end
