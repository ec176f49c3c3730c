"""One device's engine, shared by everything the worker computes.

In the order in which a call passes through them:

* ``service`` tokenizes a call, submits its rows as one job, and makes the answer of the job's vectors
* ``shared_lock`` lets jobs run side by side, or one suspect alone; tasks and streams hold it around both
* ``jobs`` has the job, what its sender knows of it, and how it ends
* ``batcher`` is the thread that owns the engine: it collects jobs, computes batches, settles jobs
* ``next_batch`` decides which rows the next batch has, and how long it waits for more
* ``halving`` computes a batch, and finds the rows at fault when the engine fails
* ``budget`` makes batches smaller for a while after the device ran out of memory
* ``watchdog`` ends the process when the engine hangs

May import ``engines``, ``documents`` and ``client.call``; knows neither Celery nor the server.
"""
