"""The worker's loop: batches in, steps out, metrics, evaluation."""
