--- Claim entries of consumers that fell silent: all that were requeued uncounted, else one entry.
---
--- An entry that was delivered may have ended its consumer's process, so that it comes alone.
---
--- @flags    allow-oom       workers free memory: a full server must not refuse them
--- @key      entries         stream: entries that wait, or a string while the stream is closed
--- @key      closed_entries  stream: entries of a closed stream
--- @arg      consumer        name of the consumer that claims
--- @arg      silent_ms       milliseconds of silence after which an entry may be claimed
--- @constant GROUP           the consumer group
--- @constant MOST_CLAIMED    entries that are looked at in one call
--- @include  streaming/lua/open_stream
--- @returns  {deliveries, entries}: how often they were delivered before; the entries

local stream = open_stream(entries, closed_entries)
local silent = redis.pcall('XPENDING', stream, GROUP, 'IDLE', silent_ms, '-', '+', MOST_CLAIMED)
if silent.err or #silent == 0 then return {0, {}} end -- an error: no device has read this stream
local ids, deliveries = {}, 0
for _, row in ipairs(silent) do
  if row[4] == 0 then ids[#ids + 1] = row[1] end
end
if #ids == 0 then ids, deliveries = {silent[1][1]}, silent[1][4] end
return {deliveries, redis.call('XCLAIM', stream, GROUP, consumer, silent_ms, unpack(ids))}
