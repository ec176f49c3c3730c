--- Send the message of a dead letter again, unless it was retried or dropped meanwhile.
---
--- @key      dead_letters  hash: task id -> dead letter
--- @key      target        list: the queue that the message goes to
--- @arg      task_id       its task
--- @arg      message       the message to send
--- @returns  1 if it was sent

if redis.call('HDEL', dead_letters, task_id) == 0 then return 0 end
redis.call('LPUSH', target, message)
return 1
