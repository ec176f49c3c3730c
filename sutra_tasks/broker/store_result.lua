--- Store what became of a task and publish it to its caller.
---
--- A success is overwritten only by a success, whose vectors are the same. A worker whose lease ended
--- stores no errors, because other workers do its work.
---
--- @key      result       string: Celery's record of the task
--- @key      lease_ended  string: exists once the lease of the calling worker has ended
--- @arg      record       the record to store
--- @arg      ttl_s        seconds until it expires
--- @arg      state        Celery's state of the task
--- @returns  1: stored; 0: there is a success already; -1: the lease ended

if state ~= 'SUCCESS' then
  if redis.call('EXISTS', lease_ended) == 1 then return -1 end
  local is_record = redis.call('TYPE', result).ok == 'string'  -- anything else there is overwritten
  local stored = is_record and redis.call('GET', result)
  if stored and string.find(stored, '"status": "SUCCESS"', 1, true) then return 0 end
end
redis.call('SETEX', result, ttl_s, record)
redis.call('PUBLISH', result, record)
return 1
