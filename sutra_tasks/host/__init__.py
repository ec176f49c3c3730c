"""The processes of one machine: its devices, their workers, and a server for them.

Modules, in the order in which ``sutra up`` uses them:

- ``hardware``: finds GPUs and cores, and decides which device workers to start
- ``embedded_server``: runs a Valkey or Redis server
- ``local_fleet``: runs the workers for the length of a block, and waits until the devices take work
- ``supervisor``: starts worker processes, reaps and restarts them when they die, stops them in order
- ``processes``: child processes that end with their parent

Imports ``membership`` and what lies below it.
"""
