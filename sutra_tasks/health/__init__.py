"""How well a device computes, and whether it may join the fleet.

Modules, in the order in which an evaluation uses them:

- ``statistics``: counts what a device worker does, in batches and calls
- ``baseline``: learns how long batches take on this device when it is well
- ``memory``: reads how much of the device's memory is in use
- ``states``: decides a device's state from these measurements, without I/O
- ``parity``: compares the device's golden vectors with the fleet's
- ``monitor``: evaluates all of it on the heartbeat's thread

Imports ``engines`` and what lies below it; clients import ``states`` only.
"""
