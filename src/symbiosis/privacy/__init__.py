"""Privacy of what a client sends: masks in a ring of integers, and where they come from.

Knows tensors and the wire's nouns; knows no sockets, sessions or models. Executor, helper and
client all use it, and it can be reviewed by itself.
"""
