"""Typed contents of the files that stages hand on; each class knows its file's name, and reads and writes it."""
