"""The registry of models: immutable, numbered versions in a folder that all workers share.

A version passes through:

* ``manifest``: what is stored about a version; ``names``: model names, and references like ``name@3``.
* ``model_registry``: adds a version, verifies it, promotes it, rolls it back.
* ``layout``: the folder on disk; ``version_files``: copies files and computes their sha256;
  ``version_history``: which version serves, and which served before.
* ``resolve``: opens the registry of this deployment, and finds the model that a caller's name refers to.

It imports only ``errors`` and ``files``: no engine, no server.
"""
