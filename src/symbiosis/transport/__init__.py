"""Moves one exchange and its answer between a client and an executor.

`Channel` is all that the client knows of it: in process (`inproc`), or over a UNIX or TCP
socket (`sockets`). Knows no models and no scheduling.
"""
