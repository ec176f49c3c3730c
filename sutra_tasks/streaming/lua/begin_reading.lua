--- Create the group of the readers of a stream, if there is such a stream.
---
--- @key      streams    set: names of all streams
--- @key      responses  stream: the output
--- @arg      name       name of the stream
--- @constant GROUP      the consumer group of the readers
--- @returns  1, or 0 if the stream is in no list and has no output: a key that a reader makes for a
---           stream that was deleted would stay

if redis.call('SISMEMBER', streams, name) == 0 and redis.call('EXISTS', responses) == 0 then return 0 end
local made = redis.pcall('XGROUP', 'CREATE', responses, GROUP, '0', 'MKSTREAM')
if made.err and not string.find(made.err, '^BUSYGROUP') then return made end -- else another was first
return 1
