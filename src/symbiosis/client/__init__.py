"""The client: an ordinary transformers model whose frozen weights stay in the executor.

Never imports the executor. Importing it fills the tables of what a remote weight can do.
"""

from symbiosis.client import operations

__all__ = ["operations"]
