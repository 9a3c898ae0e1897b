"""Pipeline schedules as data: written by pure functions, proven by one checker. No tensors, no processes."""
