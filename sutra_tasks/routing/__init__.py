"""Which device computes a message, and how the message gets there.

Modules, in the order in which a message passes through them:

- ``router``: takes messages from the router's queue and forwards, keeps or fails them
- ``fleet_view``: reads a snapshot of the fleet at most ten times a second
- ``snapshot``: the fleet and its devices as values
- ``decision``: decides whether a message is forwarded, waits or fails
- ``balancing``: the strategies that choose a device
- ``task_failure``: stores a task's error through Celery
- ``report``: publishes the backlog, for clients, and the router's record, for ``sutra status``
- ``direct``: the same choice made by a client, which saves the hop through a router

``snapshot``, ``decision`` and ``balancing`` do no I/O. Imports ``membership``, ``broker``,
``health.states`` and what lies below them.
"""
