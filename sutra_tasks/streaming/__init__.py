"""Streams: texts that arrive one by one, and vectors that leave as they are ready."""
