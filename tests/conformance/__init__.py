"""Every architecture of the installed transformers, tiny and random: run split, compared with
the same model run whole. ``python -m tests.conformance`` is the full run; the spread that CI runs
is `test_architectures`."""
