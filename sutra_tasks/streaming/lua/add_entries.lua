--- Add a producer's batch of entries to a stream, in order, up to the first one that it refuses.
---
--- A stream refuses entries while it is full or closed, and those of low priority while it sheds. A batch
--- that is sent again because its answer was lost adds nothing and gets the same answer.
---
--- @key      entries           stream: entries that wait
--- @key      closed_entries    stream: the same while the stream is closed
--- @key      state             hash: capacity and throttle, as devices published them
--- @key      last_batch        string: number of the producer's last batch, and how many it added
--- @key      streams           set: names of all streams
--- @key      totals            hash: counters since the stream began
--- @arg      stream            name of the stream
--- @arg      batch             number of this batch among the producer's
--- @arg      default_capacity  entries that may wait, if no device published a capacity
--- @args     priorities        priority of each entry
--- @args     field_counts      how many of ``fields`` belong to each entry
--- @args     fields            names and values of all entries' fields
--- @constant LOW_PRIORITY      the first priority that is shed
--- @constant LAST_BATCH_S      seconds until ``last_batch`` expires
--- @constant TOTALS_S          seconds until ``totals`` expire
--- @include  streaming/lua/open_stream
--- @returns  how many of the first entries were added, entries that wait, capacity, throttle rate, and the
---           vectors a second of all devices

local open, closed = open_stream(entries, closed_entries)
local published = redis.call('HMGET', state, 'capacity', 'throttle_rate', 'shed', 'per_s')
local capacity, sheds = tonumber(published[1] or default_capacity), published[3] == '1'
local size, added = redis.call('XLEN', open), 0

local last = redis.call('GET', last_batch)
local last_number, last_added = string.match(last or '', '(%d+):(%d+)')
if last_number == batch then
  added = tonumber(last_added)
else
  redis.call('SADD', streams, stream)
  local before = 0
  for i, priority in ipairs(priorities) do
    if size >= capacity or closed then break end
    if sheds and tonumber(priority) >= LOW_PRIORITY then break end
    local count = tonumber(field_counts[i])
    local done = redis.pcall('XADD', open, '*', unpack(fields, before + 1, before + count))
    if done.err and added == 0 then return done end
    if done.err then break end -- the next batch begins with this entry, and gets the error
    size, added, before = size + 1, added + 1, before + count
  end
  redis.call('SET', last_batch, batch .. ':' .. added, 'EX', LAST_BATCH_S)
  redis.call('HINCRBY', totals, 'accepted', added)
  if added < #priorities then
    redis.call('HINCRBY', totals, (sheds and size < capacity) and 'shed' or 'refused', 1)
  end
  redis.call('EXPIRE', totals, TOTALS_S)
end
return {added, size, capacity, published[2] or '1', published[4] or '0'}
