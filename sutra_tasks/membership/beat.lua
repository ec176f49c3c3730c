--- Register a device, or renew its registration, and count one heartbeat of its worker.
---
--- A device without messages has its load deleted, so that a wrong count ends there.
---
--- @flags   allow-oom    without heartbeats no device works off what fills the server
--- @key     fleet        zset: device id -> time of its last heartbeat
--- @key     queues       zset: the same, kept until the device's queue is empty
--- @key     leases       hash: incarnation -> its heartbeats so far
--- @key     record       string: the device's record
--- @key     load         hash: what the device was sent and has not finished
--- @key     in_flight    list: what its worker has taken
--- @keys    lanes        lists: what waits for the device
--- @arg     device_id
--- @arg     incarnation
--- @arg     record_json
--- @arg     keep_s       seconds until the record and the load expire
--- @returns heartbeats of this incarnation, with this one
local time = redis.call('TIME')
local now_s = time[1] + time[2] / 1e6
redis.call('SET', record, record_json, 'EX', keep_s)
redis.call('ZADD', fleet, now_s, device_id)
redis.call('ZADD', queues, now_s, device_id)
if redis.call('EXISTS', in_flight, unpack(lanes)) == 0 then
  redis.call('DEL', load)
else
  redis.call('EXPIRE', load, keep_s)
end
return redis.call('HINCRBY', leases, incarnation, 1)
