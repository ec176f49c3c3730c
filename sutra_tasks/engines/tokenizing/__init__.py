"""Tokenising for engines whose tokenizer is of the package ``tokenizers``.

* ``tokenizing_encoder``: the base class of engines: texts to token ids, windows of them, and messages.
* ``slices``: tokenises very long texts in slices, to save memory.
* ``word_cache``: remembers the token ids of words, for static models.
"""
