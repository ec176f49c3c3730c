"""The models in a device's memory.

A call's model passes through:

* ``model_cache``: finds the model of a call, loads it if need be, evicts others.
* ``serving_versions``: which version of each model serves, read without touching the disk.
* ``single_flight``: loads a model on a thread of its own, for all that wait for it.
* ``waiting_places``: how many calls may wait for models, so that others find a thread.
* ``loading``: loads a model, checks it against its manifest, warms it up.
* ``eviction``: decides which models leave; ``freeing``: gives their memory back.

It may import engines, batching and ``models/registry``, never ``models/rollout``.
"""
