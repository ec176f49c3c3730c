--- Write a document, and tell its caller that no part is done yet.
---
--- A document that exists is left as it is: its message was delivered twice.
---
--- @key      document        hash: the parts of a long text, and their results
--- @key      documents       sorted set: task id -> Unix time in seconds at which missing parts are overdue
--- @key      result          string: Celery's record of the caller's task
--- @arg      task_id         the caller's task
--- @arg      ttl_s           seconds until the document expires
--- @arg      overdue_s       seconds until missing parts are overdue
--- @arg      progress        the record for the caller
--- @arg      progress_ttl_s  seconds until that record expires
--- @args     fields          names and values of the document's fields, by turns
--- @include  fanout/progress
--- @returns  1: written; 0: it exists

if redis.call('EXISTS', document) == 1 then return 0 end
for i = 1, #fields, 2 do redis.call('HSET', document, fields[i], fields[i + 1]) end
redis.call('EXPIRE', document, ttl_s)
redis.call('ZADD', documents, redis.call('TIME')[1] + overdue_s, task_id)
if has_no_outcome(result) then redis.call('SETEX', result, progress_ttl_s, progress) end
return 1
