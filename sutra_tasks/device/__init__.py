"""The device worker: a Celery worker whose tasks meet in one batcher, on one device.

In the order in which a message passes through them:

* ``pool`` is the Celery adapter: it runs tasks on threads, and starts and stops the runtime
* ``runtime`` is what a device worker is made of: it builds, starts, drains and stops the parts
* ``tasks`` is what the tasks of ``embed`` and of long texts do here
* ``execution`` admits a task's computation, and decides what becomes of its message if it has no answer
* ``description`` makes the record of the device that each heartbeat carries

The computation itself is in ``sutra_tasks.batching``. May import everything but ``roles`` and ``cli``.
"""
