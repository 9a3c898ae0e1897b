"""The tasks, one a file, each a `TASK`."""
