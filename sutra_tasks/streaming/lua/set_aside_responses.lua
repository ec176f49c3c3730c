--- Keep responses that a reader cannot read as dead letters, each with its reason, and acknowledge them.
---
--- @flags    allow-oom     a reader must get past what it cannot read on a full server as well
--- @key      responses     stream: the output
--- @key      dead_letters  stream: what was given up
--- @args     ids           ids of the responses
--- @args     reasons       of each response
--- @constant GROUP         the consumer group of the readers

for i, id in ipairs(ids) do
  local found = redis.call('XRANGE', responses, id, id)[1]
  if found then -- else another reader kept it
    local letter = found[2]
    letter[#letter + 1], letter[#letter + 2] = 'reason', reasons[i]
    letter[#letter + 1], letter[#letter + 2] = 'unreadable', id
    redis.call('XADD', dead_letters, '*', unpack(letter))
    redis.call('XACK', responses, GROUP, id)
    redis.call('XDEL', responses, id)
  end
end
