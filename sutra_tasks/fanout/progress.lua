--- Say whether a record of progress may replace what the caller's task has.
---
--- A message may be delivered again after its outcome is stored, and an outcome is never replaced.

local function has_no_outcome(result)
  local record = redis.call('GET', result)
  return not record or string.find(record, '"status": "PROGRESS"', 1, true)
end
