"""The nouns on the wire: frames, tensors, exchanges. No sockets, no threads, no policy."""
