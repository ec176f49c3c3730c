--- Write the response for some chunks of an open text, and drop the bytes that are done.
---
--- @flags    allow-oom     workers free memory: a full server must not refuse them
--- @key      responses     stream: gets the response
--- @key      texts         sorted set: key of an open text -> when it last grew, ms
--- @key      takeable      sorted set: key of an open text -> when it may be taken, ms
--- @key      buffered      string: bytes of all open texts
--- @key      text          hash: the text
--- @key      pieces        list: its pieces
--- @key      dead_letters  stream: what was given up
--- @arg      key           key of the text
--- @arg      token         the token with which it was taken
--- @arg      done_bytes    bytes at the start of its buffer that are done
--- @arg      position      where its next chunk begins, in characters
--- @arg      number        chunks so far
--- @arg      covered       behind the last character of its last chunk
--- @arg      need          bytes from which on it may be taken again
--- @arg      text_after    'ended', 'idle' (it was flushed), or 'open'
--- @args     response      names and values; none: nothing is written
--- @args     letter        names and values of the dead letter of these bytes; none: they are embedded
--- @include  streaming/lua/clock
--- @include  streaming/lua/write_answer
--- @returns  {seconds, microseconds, count}: the server's time; 0 if the text was taken by another
---           consumer since, else 1

local time = redis.call('TIME')

local function remove_text()
  redis.call('DEL', text)
  redis.call('ZREM', texts, key)
  redis.call('ZREM', takeable, key)
end

if redis.call('HGET', text, 'token') ~= token then return {time[1], time[2], 0} end
-- Every key is looked at before anything is written: one of a wrong type ends the script here.
local buffer, pieces_left = redis.call('HGET', text, 'buffer') or '', redis.call('LLEN', pieces)
redis.call('GET', buffered)
redis.call('ZCARD', texts)
redis.call('ZCARD', takeable)
write_answer(responses, response, dead_letters, letter)
redis.call('HDEL', text, 'token')
local dropped = text_after == 'ended' and #buffer or tonumber(done_bytes)
if redis.call('DECRBY', buffered, dropped) <= 0 then redis.call('DEL', buffered) end
local bytes = redis.call('HINCRBY', text, 'bytes', -dropped)
if text_after == 'ended' then
  redis.call('HDEL', text, 'buffer', 'position', 'number', 'covered', 'source', 'prompt', 'entry',
    'ended', 'flush', 'need', 'attempts')
  if pieces_left == 0 then
    remove_text()
    return {time[1], time[2], 1}
  end
else
  redis.call('HSET', text, 'buffer', string.sub(buffer, dropped + 1), 'position', position,
    'number', number, 'covered', covered, 'need', need, 'attempts', 0)
  if text_after == 'idle' then
    redis.call('HDEL', text, 'flush')
    if pieces_left == 0 then redis.call('HSET', text, 'fresh', 0) end
  end
end
local ends, ended, flush = unpack(redis.call('HMGET', text, 'ends', 'ended', 'flush'))
if tonumber(ends or 0) > 0 or ended == '1' or flush or bytes >= tonumber(need) then
  redis.call('ZADD', takeable, now_ms(), key)
else
  redis.call('ZREM', takeable, key)
end
return {time[1], time[2], 1}
