--- Add the result of a part to its document, once, and tell the caller how many parts are done.
---
--- Only one caller of this script is told to send the body, because two bodies would call the caller's
--- callbacks twice. If it dies before it sends the body, the sweep of overdue documents sends it.
---
--- @flags    allow-oom       the part's rows, which are deleted, make space for its result
--- @key      document        hash: the parts of a long text, and their results
--- @key      documents       sorted set: task id -> Unix time in seconds at which missing parts are overdue
--- @key      result          string: Celery's record of the caller's task
--- @arg      task_id         the caller's task
--- @arg      part            the number of the part
--- @arg      part_result     its result; empty if the part had nothing to do
--- @arg      overdue_s       seconds until the missing parts are overdue
--- @arg      progress        the record for the caller, with "DONE" and "PARTS" in place of two numbers
--- @arg      progress_ttl_s  seconds until that record expires
--- @include  fanout/progress
--- @returns  1: the calling worker sends the body; 0: it does not; -1: the document is gone

local parts = redis.call('HGET', document, 'parts')
if not parts then return -1 end
local given_up = redis.call('HEXISTS', document, 'error') == 1
if part_result ~= '' and redis.call('HSETNX', document, 'result:' .. part, part_result) == 1 then
  redis.call('HDEL', document, 'rows:' .. part)
  redis.call('HSET', document, 'resends', 0)
  redis.call('ZADD', documents, 'XX', redis.call('TIME')[1] + overdue_s, task_id)
  local done = redis.call('HINCRBY', document, 'done', 1)
  if done < tonumber(parts) and not given_up and has_no_outcome(result) then
    progress = string.gsub(progress, '"DONE"', tostring(done))
    progress = string.gsub(progress, '"PARTS"', parts)
    redis.call('SETEX', result, progress_ttl_s, progress)
    redis.call('PUBLISH', result, progress)
  end
end
if redis.call('HGET', document, 'done') ~= parts and not given_up then return 0 end
return redis.call('HSETNX', document, 'sent', 1)
