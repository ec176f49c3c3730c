"""Smaller, faster models made by the fleet itself."""
