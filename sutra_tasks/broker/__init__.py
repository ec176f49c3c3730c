"""Messages between the server and a worker process: taken, acknowledged, forwarded, requeued, given up.

In the order in which a message passes through them:

* ``queues``: the Redis lists of a queue, and the names of worker processes
* ``transport``, ``channel``, ``deliveries``: kombu's Redis transport for workers
* ``message_check``, ``inflate``: whether a worker can run a message; the first field at fault
* ``refused``: tells the sender of a message that no worker can run
* ``take_protocol``: which commands the channel sends, and what their answers mean
* ``in_flight``: the messages that a process has taken and not acknowledged (``take.lua``)
* ``load``: what a message adds to the load of its device (``load.lua``)
* ``late_ack``: a pool of threads that acknowledge what they have finished
* ``result_backend``: stores what became of a task (``store_result.lua``)
* ``task_failure``: ends a task without running it
* ``requeue``: moves messages back to the queue they are routed from (``requeue.lua``)
* ``answered``: tells which messages of a dead worker have their answer, and are dropped instead
* ``attempts``: how many workers died with a message
* ``dead_letters``: messages that were given up (``retry_dead_letter.lua``)

Imports ``client`` and the modules at the top of the package. Which device gets a message is decided in
``routing``, and that a worker is dead in ``membership``.
"""
