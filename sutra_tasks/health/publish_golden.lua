--- Publish a device's golden vectors as those of the fleet, unless the fleet has some.
---
--- @flags   allow-oom    a device that cannot join does not work off what fills the server
--- @key     golden       string: the fleet's golden vectors, as JSON
--- @arg     golden_json  those of this device
--- @arg     keep_s       seconds until they expire
--- @returns the golden vectors that the fleet had, or false
return redis.call('SET', golden, golden_json, 'NX', 'GET', 'EX', keep_s)
