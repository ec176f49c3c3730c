--- Find the key that has the entries of a stream.
---
--- A stream over its hard limit is closed: its entries stand under `closed_entries`, and `entries` is a
--- string, so that every XADD fails.

-- Returns the key, and whether the stream is closed.
local function open_stream(entries, closed_entries)
  if redis.call('TYPE', entries).ok == 'string' then return closed_entries, true end
  return entries, false
end
