"""The client: an ordinary transformers model whose frozen weights stay in the executor.

Never imports the executor. Importing it fills the tables of what a remote weight can do.
"""

from symbiosis.client import lazy, operations

__all__ = ["lazy", "operations"]
