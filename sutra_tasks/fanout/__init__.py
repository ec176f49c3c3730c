"""Long texts on many devices: a call whose chunks are many becomes a chord of parts.

The device that takes the call tokenises and chunks it, writes a document to the results server, and
sends one small message for each part, without text: the device that computes a part reads its token ids
from the document. The chord's body is the caller's own message under another task name, hence with its
id and its callbacks. Parts and body have the routing, credit, priority, deadline and requeueing of any
message.

Celery's own join counts the results that arrive. It is misled by a part that runs twice, and by a pause
of an hour. Here each part's result is written to the document once, and the body is sent when no result
is missing, or at the first error. A sweep finds what a crash or a person lost, and sends it again.

In the order in which a call passes:

- ``long_texts``: what a device does: fan a call out, embed a part, combine the results;
- ``dividing``: which rows make a part;
- ``messages``: the messages of the parts and of the body;
- ``documents``: what happens to a document: begun, a part joined, failed;
- ``values``: a document as it is begun, and what is read of it;
- ``store``: the document on the results server, with its scripts (``*.lua``);
- ``sender``: parts and body on their way to queues;
- ``tasks``: the Celery tasks of a part and of the body;
- ``result_backend``: the workers' result backend, which joins parts to their document;
- ``overdue``: the sweep that sends again what is missing.

It may import ``broker``, ``routing``, ``batching``, ``chunking``, ``client`` and modules at the top of
the package.
"""
