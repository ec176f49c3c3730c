--- Report the load of a device's machine, and forget the loads of devices that stopped reporting.
---
--- What another program put under the key is replaced: one key serves all streams.
---
--- @flags  allow-oom  workers free memory: a full server must not refuse them
--- @key    loads      hash: incarnation -> load and when it was reported (ms)
--- @arg    device     incarnation of the device
--- @arg    load       load of its machine, 0 to 1
--- @arg    forget_s   seconds after which a load is forgotten
--- @include streaming/lua/clock

local now = now_ms()
if redis.call('TYPE', loads).ok ~= 'hash' then redis.call('DEL', loads) end
redis.call('HSET', loads, device, load .. ' ' .. now)
local reported = redis.call('HGETALL', loads)
for i = 1, #reported, 2 do
  local at = tonumber(string.match(reported[i + 1], ' (%d+)$') or 0)
  if now - at > 1000 * forget_s then redis.call('HDEL', loads, reported[i]) end
end
redis.call('EXPIRE', loads, forget_s)
