--- Add texts to one period of the sample of real traffic, and keep those of lowest priority.
---
--- @key      sample   sorted set: text -> its priority
--- @arg      most     texts that the sample keeps
--- @arg      ttl_s    seconds until the period's sample expires
--- @args     entries  priority and text, by turns
--- @returns  the highest priority in the sample once it is full

for i = 1, #entries, 2 do redis.call('ZADD', sample, 'NX', entries[i], entries[i + 1]) end
local excess = redis.call('ZCARD', sample) - tonumber(most)
if excess > 0 then redis.call('ZREMRANGEBYRANK', sample, -excess, -1) end
if redis.call('TTL', sample) < 0 then redis.call('EXPIRE', sample, ttl_s) end
if excess < 0 then return false end
return redis.call('ZRANGE', sample, -1, -1, 'WITHSCORES')[2]
