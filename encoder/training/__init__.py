"""Training: recipes, objectives, losses, the trainer, and runs from a log to a release."""
