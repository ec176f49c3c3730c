"""The streams' part of a device worker: it takes entries and open texts, and commits responses.

In the order in which work passes:

- ``consumer``: builds and starts the reader's and the writer's thread
- ``intake``: the reader's thread: takes, forms batches and submits them
- ``pacing``, ``batch_size``: how much to take, how long to wait, when a batch is complete; pure
- ``items``: an entry or a stretch of an open text on its way, and its answer
- ``tokenizing``: items get their chunks, and rows for the engine
- ``submission``: batches go to the batcher that the device's tasks use as well
- ``commit``: the writer's thread: commits what is computed, and does the upkeep meanwhile
- ``requeue``: items that were not computed go to other devices
- ``faults``: what is wrong with single streams, which are left alone for a while
- ``shared_state``: what the threads share, under one lock
- ``upkeep``: backpressure, idle texts and reports; each stream by one device at a time
- ``recorder``: what the device measures
- ``machine_load``: how loaded its machine is

It imports the values and stores of ``streaming``, and nothing of ``streaming/client``.
"""
