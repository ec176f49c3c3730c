"""The distill worker: runs one distillation at a time.

A message of the task ``distill`` passes through:

* ``pool``: Celery's pool; takes the run's lock, reads its texts, and runs it.
* ``run_lock``: excludes another run for the same model.
* ``run_sample``: the texts that the run drew from the sample of real traffic.
* ``run``: the steps from texts to a version in the registry.
* ``run_monitor``: reports progress; pauses and ends the run.
* ``attempts``: gives up a run that keeps ending its worker.

It may import the other folders of ``distillation``, ``models``, ``engines``, ``client`` and ``broker``;
torch only inside a run.
"""
