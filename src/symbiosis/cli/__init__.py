"""The command line: the only place that reads the environment and configures logging.

Each command is thin: it reads options, calls the library and renders what comes back. Torch and
transformers are imported inside the commands, so that ``symbiosis --help`` is instant.
"""
