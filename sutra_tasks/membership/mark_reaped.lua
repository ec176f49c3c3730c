--- Mark that the lease of a worker has ended, so that it can store no errors from here on.
---
--- @flags   allow-oom    without the mark no message is requeued, and a full server stays full
--- @key     mark         string, on the results server
--- @arg     keep_s       seconds until it expires
redis.call('SET', mark, 1, 'EX', keep_s)
