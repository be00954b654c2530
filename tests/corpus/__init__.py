"""Spellings of attention, and look-alikes: what each must be recognised as."""
