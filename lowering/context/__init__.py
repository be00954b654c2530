"""Attention over a sequence that several ranks share."""
