--- Move messages from a list back to queues, to the end that is taken from next.
---
--- A message that is not in the list any more is left alone, so any number of callers, or one that is
--- killed between two calls, lose and double nothing.
---
--- @flags    allow-oom  work must go back to where it is worked off, also on a full server
--- @key      source     list: what a worker has in flight, or what waits for a device
--- @key      load       hash: the load of the device whose messages these are
--- @keys     targets    lists: where each message goes
--- @args     messages   each message as it stands in ``source``
--- @args     requeued   each message as it is requeued; empty: it is removed and goes nowhere
--- @args     weights    tokens of each in the load
--- @include  broker/load
--- @returns  how many messages moved

local moved, removed_weights = 0, {}
for i, message in ipairs(messages) do
  if redis.call('LREM', source, 1, message) == 1 then
    removed_weights[#removed_weights + 1] = weights[i]
    if requeued[i] ~= '' then
      redis.call('RPUSH', targets[i], requeued[i])
      moved = moved + 1
    end
  end
end
remove_load(load, removed_weights)
return moved
