"""Measures a student beside its teacher, and writes what was measured.

* ``measurement``: all measurements of one student.
* ``quality``: how much of the teacher's vectors it preserves; uses ``ranking`` (neighbours, NDCG),
  ``correlation`` (Spearman) and ``bootstrap`` (confidence intervals).
* ``speed``: teacher and student take turns.
* ``report``: the HTML page, with the plots of ``plots``; ``model_card``: the README of the student.

It may import ``distillation/data``, ``distillation/training/projection`` and engines; no torch.
"""
