--- Give a document up with its first error.
---
--- @flags    allow-oom  an error ends work and frees its rows, also on a full server
--- @key      document   hash: the parts of a long text, and their results
--- @arg      error      the exception, as Celery stores it
--- @returns  1: the calling worker sends the body; 0: it does not

if redis.call('EXISTS', document) == 0 then return 0 end
redis.call('HSETNX', document, 'error', error)
return redis.call('HSETNX', document, 'sent', 1)
