--- Have open texts flushed that stopped growing, and give up those that were abandoned.
---
--- An idle text may go on afterwards; an abandoned one is over. A call looks at BATCH texts or a few
--- more, and the next call goes on behind them.
---
--- @flags    allow-oom      workers free memory: a full server must not refuse them
--- @key      texts          sorted set: key of an open text -> when it last grew, ms
--- @key      takeable       sorted set: key of an open text -> when it may be taken, ms
--- @key      buffered       string: bytes of all open texts
--- @key      state          hash: its field `flushed` says up to when idle texts were looked at
--- @family   text           hashes: text .. key is an open text; the sorted set names the keys
--- @arg      idle_ms        milliseconds without growth after which a text is flushed; 0: never
--- @arg      abandoned_ms   milliseconds without growth after which a text is over
--- @arg      most_texts     open texts at most: those that have not grown for the longest are over
--- @arg      most_buffered  bytes of open texts from which on every text is flushed: no entry is read
--- @arg      state_s        seconds until the state expires
--- @constant BATCH          texts that one call looks at
--- @include  streaming/lua/clock

local now = now_ms()

local function flush(keys, ending)
  for _, key in ipairs(keys) do
    if redis.call('TYPE', text .. key).ok ~= 'hash' then
      redis.call('ZREM', texts, key)
    elseif ending == 'abandoned' or redis.call('HGET', text .. key, 'fresh') == '1' then
      redis.call('HSET', text .. key, 'flush', ending)
      redis.call('ZADD', takeable, 'NX', now, key)
    end
  end
end

local function flush_idle(grew_until)
  local since = '(' .. (redis.call('HGET', state, 'flushed') or '-inf')
  local some = redis.call('ZRANGEBYSCORE', texts, since, grew_until, 'WITHSCORES', 'LIMIT', 0, BATCH)
  local last = some[#some]
  if not last then return end
  flush(redis.call('ZRANGEBYSCORE', texts, since, last), 'idle') -- all that grew in the same ms
  redis.call('HSET', state, 'flushed', last)
  redis.call('EXPIRE', state, state_s)
end

if tonumber(idle_ms) > 0 then flush_idle(now - idle_ms) end
if tonumber(redis.call('GET', buffered) or 0) >= tonumber(most_buffered) then flush_idle(now - 1) end
flush(redis.call('ZRANGEBYSCORE', texts, '-inf', now - abandoned_ms, 'LIMIT', 0, BATCH), 'abandoned')
local surplus = math.min(BATCH, redis.call('ZCARD', texts) - most_texts)
if surplus > 0 then flush(redis.call('ZRANGE', texts, 0, surplus - 1), 'abandoned') end
