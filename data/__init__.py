"""Prompts, chat formatting, packing, and readers for users' data sets."""
