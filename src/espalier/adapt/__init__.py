"""Adaptation methods: a file each, found by the registry, imported by nothing."""
