--- Take the lock of a model's next version, or renew it.
---
--- A task that is delivered again after its worker died takes the lock over from itself. The process that
--- it took the lock from cannot renew it.
---
--- @flags    allow-oom    a run must keep its lock, also on a full server
--- @key      lock         string: the task and the worker process that make the next version
--- @arg      task         the task's id and a space
--- @arg      incarnation  the worker process
--- @arg      ttl_s        seconds until the lock expires
--- @arg      renew        '1' to renew it; '0' to take it
--- @returns  the task and the process that hold it, if the caller does not get it

local holder = redis.call('GET', lock)
if holder and holder ~= task .. incarnation then
  local is_same_task = string.sub(holder, 1, #task) == task
  if renew == '1' or not is_same_task then return holder end
end
redis.call('SET', lock, task .. incarnation, 'EX', ttl_s)
return false
