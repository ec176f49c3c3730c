--- Count in a device's load what it was sent and has not finished.
---
--- Included by every script that moves a message to or from a device, so that the load changes in the
--- step that moves the message and cannot drift from it. A message of weight 0 did not come through
--- the router and is in no load.
---
--- @constant MOST_CREDIT  tokens of credit that one message uses at most
--- @constant LOAD_TTL_S   seconds until a load expires that no heartbeat renews

--- Add a message to the load of the device that it is sent to.
local function add_load(load, weight)
  weight = tonumber(weight)
  if weight == 0 then return end
  redis.call('HINCRBY', load, 'messages', 1)
  redis.call('HINCRBY', load, 'credit', math.min(weight, MOST_CREDIT))
  if redis.call('HINCRBY', load, 'tokens_dispatched', weight) == weight then
    redis.call('EXPIRE', load, LOAD_TTL_S)
  end
end

--- Remove messages, given their weights, from the load of their device; an expired load stays away.
local function remove_load(load, weights)
  local messages, credit, tokens = 0, 0, 0
  for _, weight in ipairs(weights) do
    weight = tonumber(weight)
    if weight > 0 then
      messages, tokens = messages + 1, tokens + weight
      credit = credit + math.min(weight, MOST_CREDIT)
    end
  end
  if messages == 0 or redis.call('EXISTS', load) == 0 then return end
  redis.call('HINCRBY', load, 'messages', -messages)
  redis.call('HINCRBY', load, 'credit', -credit)
  redis.call('HINCRBY', load, 'tokens_completed', tokens)
end
