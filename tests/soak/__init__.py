"""Clients of many kinds come and go for a long time, and what must hold is checked throughout."""
