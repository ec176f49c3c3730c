"""The three roles of a worker process, as Celery apps: router, device and distill.

Modules, in the order in which a worker uses them:

- ``__main__``: ``python -m sutra_tasks.roles device`` starts a worker of one role
- ``apps``: the client's app with the settings of a role
- ``consumer``: checks the servers, and Celery's consumer that does so whenever it has connected
- ``bootsteps``: what runs beside Celery's consumer: the router's ticks and the reaper
- ``control``: periodic tasks and remote-control commands about health

May import everything but ``cli``.
"""
