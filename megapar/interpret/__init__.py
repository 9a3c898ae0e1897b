"""Looking inside a model while it runs, in whatever layout: see docs/interpretability.md."""
