--- Take entries for one consumer, and move the pieces of open texts to their texts.
---
--- A piece leaves the stream as soon as it is read, whichever consumer reads it, and goes to the end of
--- its text's list. An entry that cannot be a piece, a piece ahead of its number, or one of a text whose
--- keys have a wrong type, is taken as an entry. A numbered piece that was there before is dropped.
---
--- @flags    allow-oom       workers free memory: a full server must not refuse them
--- @key      streams         set: names of all streams; one that is not in it was deleted
--- @key      entries         stream: entries that wait, or a string while the stream is closed
--- @key      closed_entries  stream: entries of a closed stream
--- @key      responses       stream: what readers have not acknowledged
--- @key      texts           sorted set: key of an open text -> when it last grew, ms
--- @key      takeable        sorted set: key of an open text -> when it may be taken, ms
--- @key      buffered        string: bytes of all open texts
--- @family   text            hashes: text .. key is an open text; an entry names its key
--- @family   pieces          lists: pieces .. key are the text's pieces
--- @arg      name            name of the stream
--- @arg      consumer        name of the consumer
--- @arg      most            entries to take at most
--- @arg      most_buffered   bytes of open texts from which on no entry is taken
--- @arg      most_unread     responses from which on nothing is taken
--- @arg      first_need      bytes from which on a new text may be taken
--- @constant GROUP           the consumer group
--- @constant MOST_NAME_BYTES bytes of the longest id or key
--- @include  streaming/lua/open_stream
--- @include  streaming/lua/clock
--- @returns  {last, taken, count}: the id behind which the next entry will stand, if there is none now and
---           the stream is open, else ''; the entries; how many texts may be taken

local now = now_ms()
local stream, is_closed = open_stream(entries, closed_entries)

local function count_takeable()
  return redis.call('ZCOUNT', takeable, '-inf', now)
end

local function can_be(key, kind)
  local found = redis.call('TYPE', key).ok
  return found == kind or found == 'none'
end

local function read_entries()
  local function read_group(call)
    return call('XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', most, 'STREAMS', stream, '>')
  end
  local found = read_group(redis.pcall)
  if found and found.err then -- no device has read this stream before
    redis.call('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
    found = read_group(redis.call)
  end
  return found and found[1] and found[1][2] or {}
end

local function last_delivered()
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    if group[2] == GROUP then return group[8] end
  end
  return ''
end

-- Returns a piece, or nil if the entry is none, and whether it is the next one of its text.
local function parse_piece(entry)
  local values, found = entry[2], {}
  for i = 1, #values, 2 do found[values[i]] = values[i + 1] end
  local key, id, is_last = found.key, found.id or '', found['end'] == '1' or found['end'] == 'true'
  if not key or key == '' or #key > MOST_NAME_BYTES or #id > MOST_NAME_BYTES then return nil end
  if not (found.text or is_last) then return nil end
  if not (can_be(text .. key, 'hash') and can_be(pieces .. key, 'list')) then return nil end
  local piece = {
    entry = entry[1], key = key, id = id, is_last = is_last,
    prompt = found.prompt or '', text = found.text or '',
  }
  if not found.seq or found.seq == '' then return piece, true end
  local number = string.match(found.seq, '^%d+$') and tonumber(found.seq)
  local expected = tonumber(redis.call('HGET', text .. key, 'pieces') or 0)
  if not number or number > expected then return nil end
  return piece, number == expected
end

local function append(piece)
  local key, open_text, size = piece.key, text .. piece.key, #piece.text
  redis.call('RPUSH', pieces .. key,
    cmsgpack.pack({piece.entry, piece.is_last and 1 or 0, piece.id, piece.prompt, piece.text}))
  redis.call('INCRBY', buffered, size)
  local bytes = redis.call('HINCRBY', open_text, 'bytes', size)
  redis.call('HINCRBY', open_text, 'ends', piece.is_last and 1 or 0)
  redis.call('HSET', open_text, 'fresh', 1)
  if piece.is_last then
    redis.call('HSET', open_text, 'pieces', 0)
  else
    redis.call('HINCRBY', open_text, 'pieces', 1)
  end
  redis.call('ZADD', texts, now, key)
  local need = tonumber(redis.call('HGET', open_text, 'need') or first_need)
  if piece.is_last or bytes >= need then redis.call('ZADD', takeable, 'NX', now, key) end
end

-- A read would make the keys of a deleted stream anew, and nobody would delete them.
if redis.call('SISMEMBER', streams, name) == 0 then return {'', {}, 0} end
-- Every key is looked at before an entry is taken: one of a wrong type ends the script here.
redis.call('ZCARD', texts)
local waiting = count_takeable()
if redis.call('XLEN', responses) >= tonumber(most_unread) then return {'', {}, 0} end
if tonumber(redis.call('GET', buffered) or 0) >= tonumber(most_buffered) then return {'', {}, waiting} end
local found = read_entries()
if #found == 0 then return {is_closed and '' or last_delivered(), {}, waiting} end
local taken, moved = {}, {}
for _, entry in ipairs(found) do
  local piece, is_next = parse_piece(entry)
  if piece then
    moved[#moved + 1] = piece.entry
    if is_next then append(piece) end
  else
    taken[#taken + 1] = entry
  end
end
if #moved > 0 then
  redis.call('XACK', stream, GROUP, unpack(moved))
  redis.call('XDEL', stream, unpack(moved))
end
return {'', taken, count_takeable()}
