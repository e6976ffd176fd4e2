"""Sorted training: one set of weights that runs at several depths."""
