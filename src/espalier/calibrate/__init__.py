"""What calibration data do inside a model: statistics by name, gathered one block at a time."""
