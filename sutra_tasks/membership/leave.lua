--- Take a device out of the fleet, unless another incarnation has registered it since.
---
--- @flags   allow-oom    it frees memory: a full server must not refuse it
--- @key     fleet        zset: device id -> time of its last heartbeat
--- @key     record       string: the device's record
--- @arg     device_id
--- @arg     incarnation  of the worker that leaves, in double quotes, as the record has it
--- @returns how many records were deleted, 0 or 1
local found = redis.call('GET', record)
if found and not string.find(found, incarnation, 1, true) then return 0 end
redis.call('ZREM', fleet, device_id)
return redis.call('DEL', record)
