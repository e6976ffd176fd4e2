"""Winning the quality back: objectives, teacher and training."""
