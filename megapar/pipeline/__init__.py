"""Pipeline parallelism: a schedule is data that one checker proves and one executor runs."""
