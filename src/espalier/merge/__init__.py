"""Ways to combine models: one function a file."""
