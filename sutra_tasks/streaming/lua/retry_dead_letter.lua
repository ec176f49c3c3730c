--- Add to a stream what a dead letter is sent again as, and delete the letter.
---
--- @key     dead_letters  stream: what was given up
--- @key     target        stream: entries that wait, or responses
--- @arg     id            id of the dead letter
--- @args    fields        names and values of what is added
--- @returns 1, or 0 if the letter was sent again or dropped before

if #redis.call('XRANGE', dead_letters, id, id) == 0 then return 0 end
redis.call('XADD', target, '*', unpack(fields)) -- what the server refuses ends the script: the letter stays
redis.call('XDEL', dead_letters, id)
return 1
