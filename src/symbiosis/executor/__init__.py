"""The executor: holds the frozen weights once and answers exchanges. Never imports the client."""
