"""Pipeline parallelism: one executor runs a proven schedule."""
