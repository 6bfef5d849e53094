"""The client: an ordinary transformers model whose frozen weights stay in the executor."""
