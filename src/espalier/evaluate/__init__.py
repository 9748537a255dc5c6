"""Measuring a model: perplexity and bits per byte."""
