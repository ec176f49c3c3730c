"""The models a deployment keeps: immutable versions in folders, and which of them serves."""
