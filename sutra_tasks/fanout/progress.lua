--- Say whether the caller's task is in progress, and whether a record of progress may replace what it has.
---
--- A message may be delivered again after its outcome is stored, and an outcome is never replaced.

local function is_in_progress(result)
  local record = redis.call('GET', result)
  return record and string.find(record, '"status": "PROGRESS"', 1, true)
end

local function has_no_outcome(result)
  return redis.call('EXISTS', result) == 0 or is_in_progress(result)
end
