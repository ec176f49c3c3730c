"""What an application uses: it sends calls and awaits their results; it computes nothing.

Django, Flask and script processes import it, so it loads neither engines nor the workers' code.

In the order in which a call passes:

- ``embed_task``: the Celery task ``embed``, which checks a call, admits it and sends it;
- ``embed_many``: any number of texts, sent as many calls of ``embed``;
- ``call``: a call as a checked value, and the header that routers read;
- ``admission``: the refusal of a call when too much waits in the fleet;
- ``transport``: kombu's Redis transport for clients, with one client object for each channel;
- ``results``: Celery's result and result backend for clients, which wait through outages.

It may import modules at the top of the package.
"""
