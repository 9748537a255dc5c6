"""Deltas to and from other tools' files."""
