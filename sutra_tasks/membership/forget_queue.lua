--- Stop looking at the queue of a device that has been silent for too long.
---
--- @key     queues       zset: device id -> time of its last heartbeat
--- @arg     device_id    of a device whose queue is empty
--- @arg     forget_s     seconds of silence after which a device is forgotten
local last_s = redis.call('ZSCORE', queues, device_id)
if last_s and redis.call('TIME')[1] - last_s > tonumber(forget_s) then
  redis.call('ZREM', queues, device_id)
end
