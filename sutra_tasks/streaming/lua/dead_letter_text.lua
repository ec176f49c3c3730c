--- Make the buffered part of an open text a dead letter; a commit has to drop that part afterwards.
---
--- @flags    allow-oom     workers free memory: a full server must not refuse them
--- @key      text          hash: the text
--- @key      dead_letters  stream: what was given up
--- @arg      token         the token with which the text was taken
--- @args     letter        names and values of the dead letter
--- @returns  1, or 0 if the text was taken by another consumer since

if redis.call('HGET', text, 'token') ~= token then return 0 end
redis.call('XADD', dead_letters, '*', unpack(letter))
return 1
