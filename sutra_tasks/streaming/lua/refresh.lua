--- Say that a consumer still works on entries, so that no other consumer claims them.
---
--- @flags    allow-oom       workers free memory: a full server must not refuse them
--- @key      entries         stream: entries that wait, or a string while the stream is closed
--- @key      closed_entries  stream: entries of a closed stream
--- @arg      consumer        name of the consumer
--- @args     ids             ids of the entries; those of another consumer by now are left alone
--- @constant GROUP           the consumer group
--- @include  streaming/lua/open_stream

local stream = open_stream(entries, closed_entries)
for _, id in ipairs(ids) do
  if redis.call('XPENDING', stream, GROUP, id, id, 1, consumer)[1] then
    redis.call('XCLAIM', stream, GROUP, consumer, 0, id, 'JUSTID')
  end
end
