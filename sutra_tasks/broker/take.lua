--- Acknowledge and forward messages that a worker has in flight, and take more, in one round trip.
---
--- A message that is not in flight any more was requeued and belongs to another worker: it is neither
--- forwarded nor counted. The same command run twice therefore moves each message once.
---
--- @flags    allow-oom             it moves and frees messages: a full server must not refuse it
--- @key      in_flight             list: messages that the worker has in flight, the newest first
--- @key      load                  hash: the load of the worker's own device
--- @keys     targets               lists: where each forwarded message goes
--- @keys     target_loads          hashes: the load of the device that gets each forwarded message
--- @keys     sources               lists: where messages are taken from, first served first
--- @arg      most_messages         messages to take at most
--- @arg      most_bytes            bytes after which no more is taken
--- @args     acknowledged          each message that is done, as it was taken
--- @args     acknowledged_weights  tokens of each in the device's load
--- @args     forwarded             each message to forward, as it was taken
--- @args     forwarded_weights     tokens of each in the load of its new device
--- @include  broker/load
--- @returns  the list and the message of each that was taken, in turn

local removed_weights = {}
for i, message in ipairs(acknowledged) do
  if redis.call('LREM', in_flight, 1, message) == 1 then
    removed_weights[#removed_weights + 1] = acknowledged_weights[i]
  end
end
remove_load(load, removed_weights)

for i, message in ipairs(forwarded) do
  if redis.call('LREM', in_flight, 1, message) == 1 then
    redis.call('LPUSH', targets[i], message)
    add_load(target_loads[i], forwarded_weights[i])
  end
end

local taken, bytes = {}, 0
for _, source in ipairs(sources) do
  while #taken < 2 * most_messages and bytes < tonumber(most_bytes) do
    local message = redis.call('LMOVE', source, in_flight, 'RIGHT', 'LEFT')
    if not message then break end
    taken[#taken + 1] = source
    taken[#taken + 1] = message
    bytes = bytes + #message
  end
end
return taken
