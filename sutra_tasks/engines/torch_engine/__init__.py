"""The engine on torch, for CPUs, NVIDIA and AMD GPUs, and Apple's chips.

* ``encoder``: loads a sentence-transformers model, and computes batches of token ids.
* ``modules``: loads the model's modules, and refuses those that would give other vectors.
* ``facts``: what the model says of itself, such as the name of its space.
* ``window``: decides how many tokens of a text the model computes, from all of its limits.
* ``introspection``: describes the device and the model.
* ``forward_pass``: chooses the attention implementation and the precision, and runs the model.
* ``sdpa_kernels``: restricts the kernels that torch may use.

Only this folder and ``distillation/training`` import torch when they are imported.
"""
