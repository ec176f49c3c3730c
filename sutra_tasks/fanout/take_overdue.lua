--- Take the documents whose missing parts are overdue; no other caller gets them until they are again.
---
--- Each time without progress they are overdue after twice as many seconds.
---
--- @flags    allow-oom  sending parts again ends work, also on a full server
--- @key      documents  sorted set: task id -> Unix time in seconds at which missing parts are overdue
--- @family   document   hashes: document .. task id is one document
--- @arg      most       documents to take at most
--- @arg      overdue_s  seconds until they are overdue again, for the first time without progress
--- @arg      late_s     seconds by which parts may be late, because they wait in queues
--- @returns  for each document its task id and how often it was overdue without progress; -1: it is gone

local now = redis.call('TIME')[1]
local found = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', documents, '-inf', now - late_s, 'LIMIT', 0, most)) do
  if redis.call('EXISTS', document .. id) == 0 then
    redis.call('ZREM', documents, id)
    found[#found + 1] = {id, -1}
  else
    local resends = redis.call('HINCRBY', document .. id, 'resends', 1)
    redis.call('ZADD', documents, now + overdue_s * 2 ^ resends, id)
    found[#found + 1] = {id, resends}
  end
end
return found
