"""compress: make decoder-only language models small without losing what made them good."""

__version__ = "0.1.0"
