"""Frames that nobody should send: what is mutated, how, and where it is fed. ``make fuzz``."""
