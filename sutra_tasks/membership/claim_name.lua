--- Give a device's name to a worker, unless another worker with a lease has it.
---
--- @flags   allow-oom    a full server must not keep a device from working it off
--- @key     name         string: incarnation of the worker that has the name
--- @key     leases       hash: incarnation -> its heartbeats so far
--- @arg     incarnation  of the worker that asks
--- @arg     keep_s       seconds until the name expires
--- @returns false if the name was given, else the other worker and its heartbeats so far
local holder = redis.call('GET', name)
if holder and holder ~= incarnation then
  local beats = redis.call('HGET', leases, holder)
  if beats then return { holder, beats } end
end
redis.call('SET', name, incarnation, 'EX', keep_s)
redis.call('HSETNX', leases, incarnation, 0)
return false
