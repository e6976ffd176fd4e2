"""The same measurements for every model and artifact."""
