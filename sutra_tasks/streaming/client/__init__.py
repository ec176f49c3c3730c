"""An application's side of streams: producers that add entries, and readers of the responses.

In the order in which work passes:

- ``producer``: the two producers, for a thread and for an event loop; ``producer_core``: their decisions
- ``reader``: the two readers; ``reader_core``: their decisions; ``repeats``: which chunks they drop
- ``steps``: runs the decisions, which are generators without I/O, on a thread or on an event loop

It imports the entries, responses and the backpressure arithmetic of ``streaming``, and nothing of its
devices' side.
"""
