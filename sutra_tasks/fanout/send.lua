--- Send messages to queues, and add them to the loads of their devices.
---
--- @keys     queues    lists: the queue of each message
--- @keys     loads     hashes: the load of the device of each message
--- @arg      push      LPUSH: behind the messages that wait; RPUSH: to be taken next
--- @args     messages  the messages
--- @args     weights   tokens of each message in the load; 0 of a message to the router, which adds them
--- @include  broker/load

for i, message in ipairs(messages) do
  redis.call(push, queues[i], message)
  add_load(loads[i], weights[i])
end
