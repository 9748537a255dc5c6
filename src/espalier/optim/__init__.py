"""Optimizers: a file each, found by the registry, imported by nothing."""
