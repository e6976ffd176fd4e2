"""Choosing blocks to drop, dropping them, and healing the gap."""
