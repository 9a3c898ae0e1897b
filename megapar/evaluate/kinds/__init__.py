"""The ways to evaluate, one a file, each an `EVALUATION`."""
