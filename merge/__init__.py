"""Merging recovered variants: the bridge to mergekit."""
