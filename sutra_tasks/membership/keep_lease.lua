--- Count one heartbeat of a worker that is no device of the fleet.
---
--- @flags   allow-oom    as for heartbeats of devices
--- @key     leases       hash: incarnation -> its heartbeats so far
--- @arg     incarnation
--- @returns heartbeats of this incarnation, with this one
return redis.call('HINCRBY', leases, incarnation, 1)
