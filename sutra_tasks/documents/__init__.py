"""Texts of any length: from the texts of a call to rows for the engine, and from vectors to its answer.

In the order in which a call passes:

- ``sizes``: the tokens of a chunk and up to which a text stays whole, from the settings and the model;
- ``chunking``: the spans of tokens at which one text is cut;
- ``weights``: how much the vector of each chunk counts, and the sum of them;
- ``late_chunking``: windows that the engine sees in one pass each, and the chunks each window gives;
- ``chunked_call``: all of that for a whole call: its rows, and their layout;
- ``answer``: the layout, which is JSON, and the answer that a layout and the vectors of its rows make.

It decides and computes; it does no I/O and imports no engine, only the protocol of one
(``engines.encoder``), the values of a call (``client.call``), and modules at the top of the package.
"""
