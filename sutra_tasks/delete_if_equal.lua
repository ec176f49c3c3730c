--- Delete a key if it still has the value that the caller wrote.
---
--- @key      key    string
--- @arg      value  the caller's value
--- @returns  1 if the key was deleted

if redis.call('GET', key) == value then return redis.call('DEL', key) end
return 0
