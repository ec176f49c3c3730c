--- Open a closed stream again once enough of its entries are done.
---
--- @flags    allow-oom       workers free memory: a full server must not refuse them
--- @key      entries         string: the reason why the stream is closed; becomes a stream
--- @key      closed_entries  stream: the entries
--- @arg      most            entries down to which the backlog must have fallen
--- @returns  1, or 0 if the stream is open or has more entries

if redis.call('TYPE', entries).ok ~= 'string' or redis.call('XLEN', closed_entries) > tonumber(most) then
  return 0
end
redis.call('DEL', entries)
if redis.call('EXISTS', closed_entries) == 1 then redis.call('RENAME', closed_entries, entries) end
return 1
