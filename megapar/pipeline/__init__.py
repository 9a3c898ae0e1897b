"""Pipeline parallelism: one executor runs a proven schedule; the partition says which layers a stage holds."""
