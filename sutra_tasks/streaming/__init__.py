"""Streams: texts that arrive one by one, and vectors that leave as they are ready.

In the order in which a text passes through them:

- ``entries``: an entry, which is one text or a piece of an open text
- ``client/``: producers, which add entries, and readers of the responses
- ``backpressure``: how much producers have to slow down
- ``store``: entries and open texts on the server, as devices take and answer them; ``delivered``: its
  values
- ``consumer/``: the streams' part of a device worker
- ``chunker``: chunks of a text that arrives in pieces
- ``responses``: what a stream's output has, vectors and errors
- ``upkeep_store``: the state of a stream on the server, as devices look after it
- ``metrics``: what devices measure, in a form that adds up over them
- ``status``: how the streams are, for ``sutra stream status``

The scripts of all of them are in ``lua/``. The folder imports ``documents``, ``engines`` and
``batching``, and no role of a worker.
"""
