--- Close a stream that is over its hard limit: every XADD fails until it is opened again.
---
--- @flags    allow-oom       workers free memory: a full server must not refuse them
--- @key      entries         stream: entries that wait; becomes a string
--- @key      closed_entries  stream: gets the entries
--- @arg      hard_limit      entries from which on the stream is closed
--- @arg      reason          what stands under `entries` meanwhile
--- @returns  1, or 0 if the stream is closed already or below its limit

if redis.call('TYPE', entries).ok ~= 'stream' or redis.call('XLEN', entries) < tonumber(hard_limit) then
  return 0
end
redis.call('RENAME', entries, closed_entries)
redis.call('SET', entries, reason)
return 1
