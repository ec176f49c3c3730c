"""What an application uses: it sends calls and awaits their results; it computes nothing.

Django, Flask and script processes import it, so it loads neither engines nor the workers' code.

In the order in which a call passes:

- ``embed_task``: the Celery task ``embed``, which checks a call, admits it and sends it;
- ``embed_many``: any number of texts, sent as many calls of ``embed``;
- ``texts``: any iterable of texts, divided into messages;
- ``call``: a call as a checked value, and the header that routers read;
- ``options``: Celery's options of a call, and its callbacks, checked;
- ``admission``: the refusal of a call when too much waits in the fleet;
- ``transport``: kombu's Redis transport for clients, with one client object for each channel;
- ``results``: Celery's result and backend for clients; they wait through outages and survive forks.

It may import modules at the top of the package.
"""
