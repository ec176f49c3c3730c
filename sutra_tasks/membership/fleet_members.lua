--- Return every device of the fleet, and forget those that were silent for too long.
---
--- The devices are known only from ``fleet``, hence two families of keys: a router reads the fleet
--- ten times a second, in one round trip.
---
--- @key     fleet        zset: device id -> time of its last heartbeat
--- @family  records      strings: records .. id is the record of one device
--- @family  loads        hashes: loads .. id is what one device was sent and has not finished
--- @arg     forget_s     seconds of silence after which a device is forgotten
--- @returns for each device: id, seconds since its last heartbeat, record or false, and of its load
---          messages, credit, tokens dispatched, tokens completed
local time = redis.call('TIME')
local now_s = time[1] + time[2] / 1e6
redis.call('ZREMRANGEBYSCORE', fleet, '-inf', now_s - forget_s)
local found = redis.call('ZRANGE', fleet, 0, -1, 'WITHSCORES')
local members = {}
for i = 1, #found, 2 do
  local id = found[i]
  members[#members + 1] = {
    id, tostring(now_s - found[i + 1]), redis.call('GET', records .. id),
    redis.call('HMGET', loads .. id, 'messages', 'credit', 'tokens_dispatched', 'tokens_completed')
  }
end
return members
