"""The models of a deployment: where versions are kept, which of them serve, and where they are loaded.

* ``registry``: the folder with immutable versions; a file in it says which version serves.
* ``loaded``: the models in one device's memory.
* ``rollout``: promotes a version: all devices load and check it, then it serves.

Imports go from ``rollout`` to ``loaded`` to ``registry``.
"""
