--- Take open texts that have grown enough, ended, or are to be flushed, and lease them for a while.
---
--- Each is taken with a token, and only the newest token may commit. A text that was taken before
--- without a commit is a suspect: it is taken alone, so that no other text counts as taken when it ends
--- the process again. A text that cannot be taken, because its keys are damaged, is postponed.
---
--- @flags    allow-oom   workers free memory: a full server must not refuse them
--- @key      takeable    sorted set: key of an open text -> when it may be taken, ms
--- @family   text        hashes: text .. key is an open text; the sorted set names the keys
--- @family   pieces      lists: pieces .. key are the text's pieces
--- @arg      most        texts to take at most
--- @arg      lease_ms    milliseconds until another consumer may take them
--- @arg      most_bytes  bytes of each text at most
--- @include  streaming/lua/clock
--- @returns  {taken, damaged}: of each taken text key, token, attempts, ending, buffer, source, prompt,
---           entry, position, number, covered, and when it last grew, ms; of each damaged one key and reason

local now, token = now_ms(), string.format('%.0f', now_us())

-- Moves the pieces of the first text in the list to its buffer, and returns the buffer.
local function join_pieces(open_text, list)
  local parts = {redis.call('HGET', open_text, 'buffer') or ''}
  while redis.call('HGET', open_text, 'ended') ~= '1' do
    local packed = redis.call('LPOP', list)
    if not packed then break end
    local entry, is_last, id, prompt, words = unpack(cmsgpack.unpack(packed))
    parts[#parts + 1] = words
    if redis.call('HSETNX', open_text, 'source', id ~= '' and id or entry) == 1 then
      redis.call('HSET', open_text, 'prompt', prompt, 'entry', entry)
    end
    redis.call('HSET', open_text, 'at', string.match(entry, '%d+'))
    if is_last == 1 then
      redis.call('HSET', open_text, 'ended', 1)
      redis.call('HINCRBY', open_text, 'ends', -1)
    end
  end
  local buffer = table.concat(parts)
  if #parts > 1 then redis.call('HSET', open_text, 'buffer', buffer) end
  return buffer
end

local function take(key)
  local open_text = text .. key
  local buffer = join_pieces(open_text, pieces .. key)
  redis.call('ZADD', takeable, now + lease_ms, key)
  redis.call('HSET', open_text, 'token', token)
  local attempts = redis.call('HINCRBY', open_text, 'attempts', 1)
  local source, prompt, entry, position, number, covered, at, ended, flush = unpack(redis.call('HMGET',
    open_text, 'source', 'prompt', 'entry', 'position', 'number', 'covered', 'at', 'ended', 'flush'))
  local ending = ended == '1' and 'end' or flush or ''
  if #buffer > tonumber(most_bytes) then ending = '' end
  return {
    key, token, attempts, ending, string.sub(buffer, 1, most_bytes),
    source or '', prompt or '', entry or '', position or '0', number or '0', covered or '0',
    at or tostring(now),
  }
end

local function reason_of(error)
  return type(error) == 'table' and error.err or tostring(error)
end

local taken, damaged = {}, {}
for _, key in ipairs(redis.call('ZRANGEBYSCORE', takeable, '-inf', now, 'LIMIT', 0, most)) do
  if redis.call('TYPE', text .. key).ok ~= 'hash' then
    redis.call('ZREM', takeable, key)
  else
    local is_suspect = tonumber(redis.call('HGET', text .. key, 'attempts') or 0) ~= 0
    if not is_suspect or #taken == 0 then
      local is_taken, found = pcall(take, key)
      if is_taken then
        taken[#taken + 1] = found
        if is_suspect then break end
      else
        redis.call('ZADD', takeable, now + lease_ms, key)
        damaged[#damaged + 1] = {key, reason_of(found)}
      end
    end
  end
end
return {taken, damaged}
