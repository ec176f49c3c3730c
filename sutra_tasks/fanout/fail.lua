--- Give a document up with its first error.
---
--- A document that is gone while its caller still waits is written again, with nothing but the error.
---
--- @flags    allow-oom  an error ends work and frees its rows, also on a full server
--- @key      document   hash: the parts of a long text, and their results
--- @key      documents  sorted set: task id -> Unix time in seconds at which missing parts are overdue
--- @key      result     string: Celery's record of the caller's task
--- @arg      task_id    the caller's task
--- @arg      error      the exception, as Celery stores it
--- @arg      ttl_s      seconds until a document that is written again expires
--- @arg      overdue_s  seconds until its body is sent again
--- @args     fields     names and values of its fields, by turns; empty if its body is not known
--- @include  fanout/progress
--- @returns  1: the calling worker sends the body; 0: it does not

if redis.call('EXISTS', document) == 0 then
  if #fields == 0 or not is_in_progress(result) then return 0 end
  for i = 1, #fields, 2 do redis.call('HSET', document, fields[i], fields[i + 1]) end
  redis.call('EXPIRE', document, ttl_s)
  redis.call('ZADD', documents, redis.call('TIME')[1] + overdue_s, task_id)
end
redis.call('HSETNX', document, 'error', error)
return redis.call('HSETNX', document, 'sent', 1)
