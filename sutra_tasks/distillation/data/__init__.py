"""The data of a run: its texts, and the teacher's vectors of them.

* ``traffic_sample``: devices fill a sample of the texts of real calls; a run reads it.
* ``row_readers``: rows of JSONL, text, CSV and Parquet files; ``corpus``: distinct texts and labelled
  pairs, divided into texts to learn from and texts to measure on.
* ``run_texts``: all texts of one recipe.
* ``teacher``: the teacher's name, embedding space and engine.
* ``local_embedding``: computes vectors in this process; ``vector_cache``: keeps them on disk in shards.

It may import engines, ``models/registry`` and ``models/loaded``; it imports no torch.
"""
