"""Training retaining heads: which keys and values of a long context are worth keeping."""
