"""Who is in the fleet, and what happens to the work of a worker that is gone.

Modules, in the order in which a device uses them:

- ``device_record``: what a device says of itself, as a value and as JSON
- ``fleet``: writes heartbeats and records to the server, and reads all of them in one round trip
- ``names``: one live worker has the name of a device (``claim_name.lua``)
- ``heartbeat``: the thread by which a device registers, keeps its lease and leaves
- ``leases``: decides, from counters of heartbeats, which lease has ended
- ``unstarted``: a worker that cannot start says why
- ``reaper``: ends the leases of dead workers and requeues their messages

Imports ``broker``, ``health.states`` and what lies below them; knows nothing of routing or engines.
"""
