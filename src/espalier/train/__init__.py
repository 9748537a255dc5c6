"""The training loop, its schedules, its checkpoints and what it shows."""
