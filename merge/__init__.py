"""Merging recovered variants with mergekit."""
