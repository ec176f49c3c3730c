r"""What happens to a stream in one step, as scripts of the server.

Each begins with the stream's key: ``KEYS[1]``, or ``KEYS[2]`` while the first is closed. What a worker
writes is allowed on a full server: it makes room there.

A piece of a text that is being written leaves the stream as soon as it is read, into the text's own
list, in the order of the stream, whichever worker reads it. From then on the text is somebody's for a
while: who takes it gets a token, and only the newest token may commit.
"""

from __future__ import annotations

from typing import Final

from sutra_tasks.keys import DEVICES_GROUP, READERS_GROUP

__all__ = ["ADD", "LEAVE", "OUTPUT_GROUP"]

GROUP: Final = DEVICES_GROUP
OUTPUT_GROUP: Final = READERS_GROUP

_WORKER: Final = "#!lua flags=allow-oom\n"
_OPEN: Final = """
local stream, closed = KEYS[1], false
if redis.call('TYPE', stream).ok == 'string' then stream, closed = KEYS[2], true end
"""

ADD: Final = (
    _OPEN
    + """
local said = redis.call('HMGET', KEYS[3], 'capacity', 'throttle_rate', 'shed', 'per_s')
local capacity, shed = tonumber(said[1] or ARGV[3]), said[3] == '1'
local size, taken, at = redis.call('XLEN', stream), 0, 7
local last = redis.call('GET', KEYS[4])
local number, before = string.match(last or '', '(%d+):(%d+)')
if number == ARGV[2] then
  taken = tonumber(before)
else
  redis.call('SADD', KEYS[5], ARGV[1])
  while at <= #ARGV and size < capacity and not closed do
    if shed and tonumber(ARGV[at]) >= tonumber(ARGV[4]) then break end
    local fields = tonumber(ARGV[at + 1])
    redis.call('XADD', stream, '*', unpack(ARGV, at + 2, at + 1 + fields))
    size, taken, at = size + 1, taken + 1, at + 2 + fields
  end
  redis.call('SET', KEYS[4], ARGV[2] .. ':' .. taken, 'EX', ARGV[5])
  redis.call('HINCRBY', KEYS[6], 'accepted', taken)
  if at <= #ARGV then
    redis.call('HINCRBY', KEYS[6], (shed and size < capacity) and 'shed' or 'refused', 1)
  end
  redis.call('EXPIRE', KEYS[6], ARGV[6])
end
return {taken, size, capacity, said[2] or '1', said[4] or '0'}
"""
)
"""KEYS: in, closed, state, the producer's last batch, streams, totals. ARGV: stream, number of the
batch, capacity if nobody said, first low priority, seconds the batch is remembered and totals are; then
for each entry its priority, how many names and values follow, and those. Returns how many of the first
ones were taken, size, capacity, throttle and deliveries a second. A batch that is sent again adds
nothing."""

LEAVE: Final = (
    _WORKER
    + """
local left = redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', 1000, ARGV[2])
if left.err then return end
if #left == 0 then return redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2]) end
for _, row in ipairs(left) do
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, row[1], 'IDLE', 86400000, 'JUSTID')
end
"""
)
"""KEYS: out. ARGV: group, reader. Others may have at once what it did not acknowledge, and what was sent
to it but never arrived; if there is nothing, it is forgotten."""
