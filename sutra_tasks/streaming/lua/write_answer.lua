--- Write an answer to the output and, if there is one, its dead letter: both, or none.

-- Either may be empty: nothing is written for it. Raises what the server says if it refuses one.
local function write_answer(responses, answer, dead_letters, letter)
  local written = #answer > 0 and redis.call('XADD', responses, '*', unpack(answer))
  if #letter == 0 then return end
  local kept = redis.pcall('XADD', dead_letters, '*', unpack(letter))
  if kept.err then
    if written then redis.call('XDEL', responses, written) end
    error(kept)
  end
end
