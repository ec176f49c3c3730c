--- Remove consumers and readers that have been silent for long and have nothing pending.
---
--- @flags  allow-oom  workers free memory: a full server must not refuse them
--- @keys   streams    streams: entries and responses
--- @args   groups     the consumer group of each stream
--- @arg    silent_ms  milliseconds of silence

for i, stream in ipairs(streams) do
  local consumers = redis.pcall('XINFO', 'CONSUMERS', stream, groups[i]) -- an error: there are none
  for _, consumer in ipairs(consumers) do
    local name, pending, idle_ms = consumer[2], consumer[4], consumer[6]
    if pending == 0 and idle_ms > tonumber(silent_ms) then
      redis.call('XGROUP', 'DELCONSUMER', stream, groups[i], name)
    end
  end
end
