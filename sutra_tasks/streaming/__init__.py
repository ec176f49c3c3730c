"""Streams: texts that arrive one by one, and vectors that leave as they are ready.

In the order in which a text passes through them:

==================  ===============================================================================
``entries``         an entry of a stream: one text, or a piece of an open text
``backpressure``    the level at which producers slow down, and how long they rest
``producer_core``   what a producer decides: batches, rests, repeats
``producer``        producers for threads and event loops; ``steps`` runs what was decided
``consumer``        the streams' part of a device worker: it builds the two threads below
``intake``          the reader's thread: takes entries and open texts, forms batches
``store``           entries and open texts on the server; the scripts are in ``lua/``
``pacing``          how much to take now, how long to wait
``batch_size``      when a batch is complete, and how large it should be
``tokenizing``      entries and open texts become items with rows for the engine
``chunker``         chunks of a text that arrives in pieces
``items``           an item on its way through the device, and its answer
``submission``      batches go to the batcher that the device's tasks use as well
``shared_state``    what the threads share, under one lock
``commit``          the writer's thread: writes responses and removes their entries
``requeue``         items that were not computed go to other devices
``upkeep``          backpressure, idle texts and reports, each stream by one device at a time
``upkeep_store``    the state of a stream on the server
``recorder``        what a device measures; ``metrics``: in a form that adds up over devices
``machine_load``    how loaded the machine is
``responses``       what a stream's output has: vectors and errors
``reader_core``     what a reader decides: acknowledging, claiming, waiting
``reader``          readers for threads and event loops
``status``          how the streams are, for ``sutra stream status``
==================  ===============================================================================

Imports ``documents``, ``engines`` and ``batching`` below it, and no role of a worker.
"""
