"""Builds a student and trains it towards the teacher's projected vectors.

* ``projection``: the matrix from the teacher's width to the student's, and back.
* ``students``: builds an untrained student, and saves a trained one.
* ``batches``: tokenises the texts once, and orders them into batches.
* ``losses``: the distillation loss and its terms.
* ``trainer``: the training loop; ``optimizer``: AdamW and its learning rate; ``progress``: its state and
  result; ``checkpoints``: from which it continues after its process was killed.

It imports torch, except in ``projection``, ``progress`` and ``checkpoints``.
"""
