"""Makes another version of a model serve while the fleet works: on all devices, or on none.

* ``promotion``: announces the version, waits for the devices, and moves the registry to it.
* ``gate``: decides from the version's quality and the devices' reports whether it may serve.
* ``follower``: a thread on each device; loads an announced version, and serves what the registry says.

It may import ``models/loaded``, ``models/registry``, membership and health states.
"""
