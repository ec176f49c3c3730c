--- Delete a document whose outcome is stored, or whose caller wants none.
---
--- A caller who wants no outcome has none stored in place of the progress.
---
--- @key      document   hash: the parts of a long text, and their results
--- @key      documents  sorted set: task id -> Unix time in seconds at which missing parts are overdue
--- @key      result     string: Celery's record of the caller's task
--- @arg      task_id    the caller's task
--- @include  fanout/progress

redis.call('ZREM', documents, task_id)
redis.call('DEL', document)
if is_in_progress(result) then redis.call('DEL', result) end
