"""What a model is made of, independent of its family."""
