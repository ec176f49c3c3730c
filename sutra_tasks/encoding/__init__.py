"""Texts to vectors on one device: the engines, and the batches they are fed."""
