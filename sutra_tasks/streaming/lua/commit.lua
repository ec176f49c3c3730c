--- Write one response and remove its entries; entries that another consumer committed are left out.
---
--- @flags    allow-oom       workers free memory: a full server must not refuse them
--- @key      entries         stream: entries that wait, or a string while the stream is closed
--- @key      closed_entries  stream: entries of a closed stream
--- @key      responses       stream: gets the response, if any entry is left
--- @args     header          names and values of the response, or of an error
--- @args     ids             ids of the entries
--- @args     chunks          of each entry the JSON objects of its chunks; '' for an error
--- @args     vectors         of each entry its rows; '' for an error
--- @constant GROUP           the consumer group
--- @include  streaming/lua/open_stream
--- @include  streaming/lua/is_pending
--- @returns  {seconds, microseconds, count}: the server's time; how many entries this call committed

local stream = open_stream(entries, closed_entries)
local committed, their_chunks, their_vectors = {}, {}, {}
for i, id in ipairs(ids) do
  if is_pending(stream, id) then
    local at = #committed + 1
    committed[at], their_chunks[at], their_vectors[at] = id, chunks[i], vectors[i]
  end
end
if #committed > 0 then
  if their_vectors[1] ~= '' then
    header[#header + 1], header[#header + 2] = 'chunks', '[' .. table.concat(their_chunks, ',') .. ']'
    header[#header + 1], header[#header + 2] = 'vectors', table.concat(their_vectors)
  end
  check_rights(stream)
  redis.call('XADD', responses, '*', unpack(header))
  redis.call('XACK', stream, GROUP, unpack(committed))
  redis.call('XDEL', stream, unpack(committed))
end
local time = redis.call('TIME')
return {time[1], time[2], #committed}
