"""Texts longer than a model's window: chunking, weights, and what attention the hardware offers."""
