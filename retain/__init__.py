"""Trains retaining heads, which predict the keys and values of a long context that are worth keeping."""
