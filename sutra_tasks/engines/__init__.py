"""Engines: each computes the vectors of one model on one device.

* ``encoder``: the protocol ``Encoder`` that every engine implements, and what describes its model.
* ``load``: chooses the engine for a model by the settings and the model's folder, and loads it.
* ``torch_engine``: sentence-transformers models on torch, on CPUs and GPUs.
* ``static_engine``: static models, a vector for each token, without torch.
* ``simulated_engine``: takes the time of a GPU without one, for tests and demonstrations.
* ``tokenizing``: what engines with a ``tokenizers`` tokenizer share.
* ``attention``, ``capability``: decide how a device computes attention; no torch.
* ``golden``: known texts, by which workers compare their vectors.
* ``model_folder``, ``model_files``: find a model's files, and tell what is wrong with them before they
are loaded. * ``offsets``, ``out_of_memory``: values and functions that engines share.

To add an engine, write a module or a folder beside ``torch_engine`` with a class that implements
``Encoder``; inherit ``tokenizing.tokenizing_encoder.TokenizingEncoder`` if its tokenizer is of
``tokenizers``. Let ``load.load_engine`` return it, and import its libraries only there. A value of
``SUTRA_ENGINE`` is added in ``settings``. Its ``ModelInfo.space`` must differ from that of every engine
with other vectors.

Engines import only ``errors``, ``settings`` and ``vectors``. Only ``torch_engine`` imports torch.
"""
