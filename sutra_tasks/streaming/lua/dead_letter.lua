--- Make an entry a dead letter, and write an error for its reader.
---
--- @flags    allow-oom       workers free memory: a full server must not refuse them
--- @key      entries         stream: entries that wait, or a string while the stream is closed
--- @key      closed_entries  stream: entries of a closed stream
--- @key      dead_letters    stream: entries that were given up
--- @key      responses       stream: gets the error
--- @arg      id              id of the entry
--- @args     letter          names and values of the dead letter
--- @args     answer          names and values of the error
--- @constant GROUP           the consumer group
--- @include  streaming/lua/open_stream
--- @include  streaming/lua/is_pending
--- @include  streaming/lua/write_answer
--- @returns  1, or 0 if the entry was committed or given up before

local stream = open_stream(entries, closed_entries)
if not is_pending(stream, id) then return 0 end
check_rights(stream)
write_answer(responses, answer, dead_letters, letter)
redis.call('XACK', stream, GROUP, id)
redis.call('XDEL', stream, id)
return 1
