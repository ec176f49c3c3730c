"""Chunking: from the texts of a call to rows for the engine, and from the rows' vectors to its answer.

A text that is short enough is one row; a longer one is a row for each chunk.

In the order in which a call passes:

- ``sizes``: tokens up to which a text stays whole, and tokens of a chunk, for one model;
- ``chunker``: the chunks of one text, as spans of its tokens;
- ``weights``: how much the vector of each chunk counts, and the vector that they make together;
- ``late_windows``: the windows of late chunking, and the chunks that each window gives;
- ``chunked_call``: the rows of a whole call, by all of these;
- ``answer``: the layout of the rows, and the answer that it makes of their vectors.

It decides and computes; it does no I/O and imports no engine, only the protocol of one
(``engines.encoder``), the values of a call (``client.call``), and modules at the top of the package.
"""
