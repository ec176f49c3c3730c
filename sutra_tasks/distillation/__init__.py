"""Distillation: the fleet makes smaller, faster models of larger ones.

* ``config``: the recipe and the metrics; ``distill_task``: the task that clients call.
* ``worker``: runs one recipe at a time; calls the next three in this order.
* ``data``: texts, and the teacher's vectors of them.
* ``training``: builds and trains the student.
* ``measuring``: measures the student, and writes its report and model card.
* ``names``: names and fingerprints of runs.

It may import ``models``, ``engines``, ``client``, ``broker`` and ``membership``. Clients import only
``config`` and ``distill_task``.
"""
