r"""What happens to a stream in one step, as scripts of the server.

Each begins with the stream's key: ``KEYS[1]``, or ``KEYS[2]`` while the first is closed. What a worker
writes is allowed on a full server: it makes room there.

A piece of a text that is being written leaves the stream as soon as it is read, into the text's own
list, in the order of the stream, whichever worker reads it. From then on the text is somebody's for a
while: who takes it gets a token, and only the newest token may commit.
"""

from __future__ import annotations

from typing import Final

from sutra_tasks.keys import DEVICES_GROUP, READERS_GROUP

__all__ = [
    "ADD",
    "CLAIM",
    "CLOSE",
    "COMMIT",
    "COMMIT_TEXT",
    "DROP_TEXT",
    "GIVE_BACK",
    "GIVE_UP",
    "LEAVE",
    "LET_GO",
    "OPEN",
    "OUTPUT_GROUP",
    "READ",
    "REFRESH",
    "RENEW",
    "REST",
    "SAY_LOAD",
    "TAKE",
    "TIDY",
]

GROUP: Final = DEVICES_GROUP
OUTPUT_GROUP: Final = READERS_GROUP

_WORKER: Final = "#!lua flags=allow-oom\n"
_OPEN: Final = """
local stream, closed = KEYS[1], false
if redis.call('TYPE', stream).ok == 'string' then stream, closed = KEYS[2], true end
"""
_NOW: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

ADD: Final = (
    _OPEN
    + """
local said = redis.call('HMGET', KEYS[3], 'capacity', 'throttle_rate', 'shed', 'per_s')
local capacity, shed = tonumber(said[1] or ARGV[3]), said[3] == '1'
local size, taken, at = redis.call('XLEN', stream), 0, 7
local last = redis.call('GET', KEYS[4])
local number, before = string.match(last or '', '(%d+):(%d+)')
if number == ARGV[2] then
  taken = tonumber(before)
else
  redis.call('SADD', KEYS[5], ARGV[1])
  while at <= #ARGV and size < capacity and not closed do
    if shed and tonumber(ARGV[at]) >= tonumber(ARGV[4]) then break end
    local fields = tonumber(ARGV[at + 1])
    redis.call('XADD', stream, '*', unpack(ARGV, at + 2, at + 1 + fields))
    size, taken, at = size + 1, taken + 1, at + 2 + fields
  end
  redis.call('SET', KEYS[4], ARGV[2] .. ':' .. taken, 'EX', ARGV[5])
  redis.call('HINCRBY', KEYS[6], 'accepted', taken)
  if at <= #ARGV then
    redis.call('HINCRBY', KEYS[6], (shed and size < capacity) and 'shed' or 'refused', 1)
  end
  redis.call('EXPIRE', KEYS[6], ARGV[6])
end
return {taken, size, capacity, said[2] or '1', said[4] or '0'}
"""
)
"""KEYS: in, closed, state, the producer's last batch, streams, totals. ARGV: stream, number of the
batch, capacity if nobody said, first low priority, seconds the batch is remembered and totals are; then
for each entry its priority, how many names and values follow, and those. Returns how many of the first
ones were taken, size, capacity, throttle and deliveries a second. A batch that is sent again adds
nothing."""

READ: Final = (
    _WORKER
    + _OPEN
    + _NOW
    + """
local ready = redis.call('ZCOUNT', KEYS[4], '-inf', now)
if redis.call('XLEN', KEYS[6]) >= tonumber(ARGV[9]) then return {'', {}, 0} end
local got = {}
if tonumber(redis.call('GET', KEYS[5]) or 0) < tonumber(ARGV[6]) then
  got = redis.pcall('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', ARGV[3], 'STREAMS', stream, '>')
  if got and got.err then
    redis.call('XGROUP', 'CREATE', stream, ARGV[1], '0', 'MKSTREAM')
    got = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', ARGV[3], 'STREAMS', stream, '>')
  end
  if not got and not closed then
    for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
      if group[2] == ARGV[1] then return {group[8], {}, ready} end
    end
  end
end
if not got or not got[1] then return {'', {}, ready} end
local alone, moved = {}, {}
for _, entry in ipairs(got[1][2]) do
  local fields, found = entry[2], {}
  for i = 1, #fields, 2 do found[fields[i]] = fields[i + 1] end
  local key, text, last = found.key, found.text, found['end'] == '1' or found['end'] == 'true'
  local numbered = found.seq and found.seq ~= ''
  local seq = numbered and string.match(found.seq, '^%d+$') and tonumber(found.seq)
  local text_key = ARGV[4] .. (key or '')
  local pieces = 0
  if seq then pieces = tonumber(redis.call('HGET', text_key, 'pieces') or 0) end
  if not key or key == '' or #key > tonumber(ARGV[8]) or #(found.id or '') > tonumber(ARGV[8])
      or not (text or last) or (numbered and not seq) or (seq and seq > pieces) then
    alone[#alone + 1] = entry
  else
    moved[#moved + 1] = entry[1]
    if not seq or seq == pieces then
      text = text or ''
      redis.call('RPUSH', ARGV[5] .. key,
        cmsgpack.pack({entry[1], last and 1 or 0, found.id or '', found.prompt or '', text}))
      redis.call('INCRBY', KEYS[5], #text)
      local bytes = redis.call('HINCRBY', text_key, 'bytes', #text)
      redis.call('HINCRBY', text_key, 'ends', last and 1 or 0)
      redis.call('HSET', text_key, 'fresh', 1)
      if last then redis.call('HSET', text_key, 'pieces', 0)
      else redis.call('HINCRBY', text_key, 'pieces', 1) end
      redis.call('ZADD', KEYS[3], now, key)
      if last or bytes >= tonumber(redis.call('HGET', text_key, 'need') or ARGV[7]) then
        redis.call('ZADD', KEYS[4], 'NX', now, key)
      end
    end
  end
end
if #moved > 0 then
  redis.call('XACK', stream, ARGV[1], unpack(moved))
  redis.call('XDEL', stream, unpack(moved))
end
return {'', alone, redis.call('ZCOUNT', KEYS[4], '-inf', now)}
"""
)
"""KEYS: in, closed, texts, ready, buffered, out. ARGV: group, consumer, how many, what the keys of texts
begin with and those of their lists, bytes of texts at which no more is read, characters a text needs at
first, bytes of the longest name, unread responses at which nothing is taken. Returns the id behind which
new entries will be, if there were none and the stream is open; those that are texts by themselves, or
say what cannot be; and how many texts can be taken."""

TAKE: Final = (
    _WORKER
    + _NOW
    + """
local found = {}
for _, key in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])) do
  local text, more = ARGV[3] .. key, ARGV[4] .. key
  local suspect = tonumber(redis.call('HGET', text, 'attempts') or 0) > 0
  if redis.call('EXISTS', text) == 0 then
    redis.call('ZREM', KEYS[1], key)
  elseif not suspect or #found == 0 then
    local buffer = redis.call('HGET', text, 'buffer') or ''
    local parts = {buffer}
    while redis.call('HGET', text, 'ended') ~= '1' do
      local packed = redis.call('LPOP', more)
      if not packed then break end
      local piece = cmsgpack.unpack(packed)
      parts[#parts + 1] = piece[5]
      if redis.call('HSETNX', text, 'source', piece[3] ~= '' and piece[3] or piece[1]) == 1 then
        redis.call('HSET', text, 'prompt', piece[4])
      end
      redis.call('HSET', text, 'at', string.match(piece[1], '%d+'))
      if piece[2] == 1 then
        redis.call('HSET', text, 'ended', 1)
        redis.call('HINCRBY', text, 'ends', -1)
      end
    end
    if #parts > 1 then
      buffer = table.concat(parts)
      redis.call('HSET', text, 'buffer', buffer)
    end
    redis.call('ZADD', KEYS[1], now + ARGV[2], key)
    local token = string.format('%.0f', time[1] * 1000000 + time[2])
    redis.call('HSET', text, 'takes', token)
    local is = redis.call('HMGET', text,
      'source', 'prompt', 'position', 'number', 'covered', 'at', 'flush')
    local ending = redis.call('HGET', text, 'ended') == '1' and 'end' or is[7] or ''
    if #buffer > tonumber(ARGV[5]) then ending = '' end
    found[#found + 1] = {
      key, token, redis.call('HINCRBY', text, 'attempts', 1),
      ending, string.sub(buffer, 1, ARGV[5]),
      is[1] or '', is[2] or '', is[3] or '0', is[4] or '0', is[5] or '0', is[6] or tostring(now),
    }
    if suspect then break end
  end
end
return found
"""
)
"""KEYS: ready. ARGV: how many, milliseconds they are the caller's, what keys of texts begin with and
those of their lists, bytes of each at most. Returns for each its key, the token with which it is taken,
how often it was taken since it went on, how it ends, what there is of it, source, prompt, position,
number, covered, and when it last grew. One that was taken before without going on is taken alone: it may
end the process, and others would count as taken so often, too."""

COMMIT: Final = (
    _WORKER
    + _OPEN
    + """
local kept, chunks, rows = {}, {}, {}
for i = 3 + tonumber(ARGV[2]), #ARGV, 3 do
  if redis.call('XACK', stream, ARGV[1], ARGV[i]) == 1 then
    kept[#kept + 1], chunks[#chunks + 1], rows[#rows + 1] = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  end
end
if #kept > 0 then
  redis.call('XDEL', stream, unpack(kept))
  local fields = {unpack(ARGV, 3, 2 + tonumber(ARGV[2]))}
  if rows[1] ~= '' then
    fields[#fields + 1], fields[#fields + 2] = 'chunks', '[' .. table.concat(chunks, ',') .. ']'
    fields[#fields + 1], fields[#fields + 2] = 'vectors', table.concat(rows)
  end
  redis.call('XADD', KEYS[3], '*', unpack(fields))
end
local time = redis.call('TIME')
return {time[1], time[2], #kept}
"""
)
"""KEYS: in, closed, out. ARGV: group, how many names and values of the response follow, those; then for
each entry its id, the JSON of its chunks and their rows; no rows for an error. Returns the time, and how
many entries nobody had committed before."""

COMMIT_TEXT: Final = (
    _WORKER
    + _NOW
    + """
if redis.call('HGET', KEYS[5], 'takes') ~= ARGV[2] then return {time[1], time[2], 0} end
redis.call('HDEL', KEYS[5], 'takes')
if #ARGV > 8 then redis.call('XADD', KEYS[1], '*', unpack(ARGV, 9)) end
local buffer = redis.call('HGET', KEYS[5], 'buffer') or ''
local dropped = ARGV[8] == 'last' and #buffer or tonumber(ARGV[3])
if redis.call('DECRBY', KEYS[4], dropped) <= 0 then redis.call('DEL', KEYS[4]) end
local bytes = redis.call('HINCRBY', KEYS[5], 'bytes', -dropped)
local ends = tonumber(redis.call('HGET', KEYS[5], 'ends') or 0)
local need, more = tonumber(ARGV[7]), redis.call('LLEN', KEYS[6])
if ARGV[8] == 'last' then
  redis.call('HDEL', KEYS[5], 'buffer', 'position', 'number', 'covered', 'source', 'prompt', 'ended',
    'flush', 'need', 'attempts')
  if more == 0 then
    redis.call('DEL', KEYS[5])
    redis.call('ZREM', KEYS[2], ARGV[1])
    redis.call('ZREM', KEYS[3], ARGV[1])
    return {time[1], time[2], 1}
  end
else
  redis.call('HSET', KEYS[5], 'buffer', string.sub(buffer, dropped + 1), 'position', ARGV[4],
    'number', ARGV[5], 'covered', ARGV[6], 'need', ARGV[7], 'attempts', 0)
  if ARGV[8] == 'idle' then
    redis.call('HDEL', KEYS[5], 'flush')
    if more == 0 then redis.call('HSET', KEYS[5], 'fresh', 0) end
  end
end
local ended = redis.call('HGET', KEYS[5], 'ended') == '1' or redis.call('HGET', KEYS[5], 'flush')
if ends > 0 or ended or bytes >= need then redis.call('ZADD', KEYS[3], now, ARGV[1])
else redis.call('ZREM', KEYS[3], ARGV[1]) end
return {time[1], time[2], 1}
"""
)
"""KEYS: out, texts, ready, buffered, the text, its list. ARGV: key, the token with which it was taken,
bytes that are done with, position, number, covered, bytes from which on it is to be taken again, whether
it was its ``last`` chunk, one because it was ``idle``, or there is ``more`` to come; then names and
values of a response, if there is one. Returns the time, and 0 if somebody else has taken it since."""

CLAIM: Final = (
    _WORKER
    + _OPEN
    + """
local rows = redis.pcall('XPENDING', stream, ARGV[1], 'IDLE', ARGV[3], '-', '+', 64)
local ids, count = {}, 0
for _, row in ipairs(rows) do
  if row[4] == 0 then ids[#ids + 1] = row[1] end
end
if #ids == 0 and rows[1] then
  ids, count = {rows[1][1]}, rows[1][4]
end
if #ids == 0 then return {0, {}} end
return {count, redis.call('XCLAIM', stream, ARGV[1], ARGV[2], ARGV[3], unpack(ids))}
"""
)
"""KEYS: in, closed. ARGV: group, consumer, milliseconds of silence. Returns how often they were
delivered, and entries that a consumer fell silent over: all that were given back, else one."""

REFRESH: Final = (
    _WORKER
    + _OPEN
    + """
for i = 3, #ARGV do
  if redis.call('XPENDING', stream, ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2])[1] then
    redis.call('XCLAIM', stream, ARGV[1], ARGV[2], 0, ARGV[i], 'JUSTID')
  end
end
"""
)
"""KEYS: in, closed. ARGV: group, consumer, ids it is still at work on."""

GIVE_BACK: Final = (
    _WORKER
    + _OPEN
    + """
for i = 4, #ARGV do
  if redis.call('XPENDING', stream, ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2])[1] then
    redis.call('XCLAIM', stream, ARGV[1], ARGV[2], 0, ARGV[i],
      'IDLE', 86400000, 'RETRYCOUNT', ARGV[3], 'JUSTID')
  end
end
"""
)
"""KEYS: in, closed. ARGV: group, consumer, how often they count as delivered, ids others may have."""

GIVE_UP: Final = (
    _WORKER
    + _OPEN
    + """
if redis.call('XACK', stream, ARGV[1], ARGV[2]) == 0 then return 0 end
redis.call('XDEL', stream, ARGV[2])
local fields = tonumber(ARGV[3])
redis.call('XADD', KEYS[3], '*', unpack(ARGV, 4, 3 + fields))
redis.call('XADD', KEYS[4], '*', unpack(ARGV, 4 + fields))
return 1
"""
)
"""KEYS: in, closed, dead, out. ARGV: group, id, how many names and values of the dead letter follow,
those, names and values of the error."""

DROP_TEXT: Final = (
    _WORKER
    + """
if redis.call('HGET', KEYS[1], 'takes') ~= ARGV[1] then return 0 end
redis.call('XADD', KEYS[2], '*', unpack(ARGV, 3, 2 + tonumber(ARGV[2])))
return 1
"""
)
"""KEYS: the text, dead. ARGV: the token with which it was taken, how many names and values of the dead
letter follow, those. The text goes on behind what is given up, by :data:`COMMIT_TEXT`."""

RENEW: Final = (
    _WORKER
    + _NOW
    + """
for i = 3, #ARGV, 2 do
  if redis.call('HGET', ARGV[2] .. ARGV[i], 'takes') == ARGV[i + 1] then
    redis.call('ZADD', KEYS[1], 'XX', now + ARGV[1], ARGV[i])
  end
end
"""
)
"""KEYS: ready. ARGV: milliseconds, what keys of texts begin with; keys and their tokens."""

LET_GO: Final = (
    _WORKER
    + _NOW
    + """
for i = 2, #ARGV, 2 do
  local text = ARGV[1] .. ARGV[i]
  if redis.call('HGET', text, 'takes') == ARGV[i + 1] then
    redis.call('HDEL', text, 'takes')
    redis.call('HINCRBY', text, 'attempts', -1)
    redis.call('ZADD', KEYS[1], 'XX', now, ARGV[i])
  end
end
"""
)
"""KEYS: ready. ARGV: what keys of texts begin with; keys and their tokens. Others may have them at once,
and they count as never taken."""

REST: Final = (
    _WORKER
    + _NOW
    + """
local function flush(keys, how)
  for _, key in ipairs(keys) do
    local text = ARGV[1] .. key
    if redis.call('EXISTS', text) == 0 then redis.call('ZREM', KEYS[1], key)
    elseif how == 'abandoned' or redis.call('HGET', text, 'fresh') == '1' then
      redis.call('HSET', text, 'flush', how)
      redis.call('ZADD', KEYS[2], 'NX', now, key)
    end
  end
end
local function flush_idle(most)
  local since = '(' .. (redis.call('HGET', KEYS[4], 'flushed') or '-inf')
  local some = redis.call('ZRANGEBYSCORE', KEYS[1], since, most, 'WITHSCORES', 'LIMIT', 0, 64)
  local last = some[#some]
  if not last then return end
  flush(redis.call('ZRANGEBYSCORE', KEYS[1], since, last), 'idle')
  redis.call('HSET', KEYS[4], 'flushed', last)
  redis.call('EXPIRE', KEYS[4], ARGV[6])
end
if tonumber(ARGV[2]) > 0 then flush_idle(now - ARGV[2]) end
if tonumber(redis.call('GET', KEYS[3]) or 0) >= tonumber(ARGV[5]) then flush_idle(now - 1) end
flush(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[3], 'LIMIT', 0, 64), 'abandoned')
local surplus = math.min(64, redis.call('ZCARD', KEYS[1]) - ARGV[4])
if surplus > 0 then flush(redis.call('ZRANGE', KEYS[1], 0, surplus - 1), 'abandoned') end
"""
)
"""KEYS: texts, ready, buffered, state. ARGV: what keys of texts begin with, milliseconds without growth
after which what there is of a text is embedded, and after which it is over; how many may be open at
once; bytes of texts at which no more is read, so that some are embedded as they are; seconds for which
it is remembered how far texts were looked through."""

CLOSE: Final = (
    _WORKER
    + """
if redis.call('TYPE', KEYS[1]).ok ~= 'stream' or redis.call('XLEN', KEYS[1]) < tonumber(ARGV[1]) then
  return 0
end
redis.call('RENAME', KEYS[1], KEYS[2])
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""
)
"""KEYS: in, closed. ARGV: entries from which on ``XADD`` is to fail, what stands there meanwhile."""

OPEN: Final = (
    _WORKER
    + """
if redis.call('TYPE', KEYS[1]).ok ~= 'string' or redis.call('XLEN', KEYS[2]) > tonumber(ARGV[1]) then
  return 0
end
redis.call('DEL', KEYS[1])
redis.call('RENAME', KEYS[2], KEYS[1])
return 1
"""
)
"""KEYS: in, closed. ARGV: entries down to which the backlog must have fallen."""

SAY_LOAD: Final = (
    _WORKER
    + _NOW
    + """
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ' ' .. now)
local said = redis.call('HGETALL', KEYS[1])
for i = 1, #said, 2 do
  local at = tonumber(string.match(said[i + 1], ' (%d+)$') or 0)
  if now - at > 1000 * ARGV[3] then redis.call('HDEL', KEYS[1], said[i]) end
end
redis.call('EXPIRE', KEYS[1], ARGV[3])
"""
)
"""KEYS: loads. ARGV: who, how loaded its machine is, seconds after which it is forgotten."""

LEAVE: Final = (
    _WORKER
    + """
local left = redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', 1000, ARGV[2])
if left.err then return end
if #left == 0 then return redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2]) end
for _, row in ipairs(left) do
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, row[1], 'IDLE', 86400000, 'JUSTID')
end
"""
)
"""KEYS: out. ARGV: group, reader. Others may have at once what it did not acknowledge, and what was sent
to it but never arrived; if there is nothing, it is forgotten."""

TIDY: Final = (
    _WORKER
    + """
for i = 1, #KEYS do
  local known = redis.pcall('XINFO', 'CONSUMERS', KEYS[i], ARGV[i + 1])
  for _, one in ipairs(known) do
    if one[4] == 0 and one[6] > tonumber(ARGV[1]) then
      redis.call('XGROUP', 'DELCONSUMER', KEYS[i], ARGV[i + 1], one[2])
    end
  end
end
"""
)
"""KEYS: in, out. ARGV: milliseconds, the group of each. Forgets consumers and readers that have been
silent for so long and have nothing."""
