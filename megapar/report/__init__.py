"""Pictures of a run, drawn after it by the process that started it."""
