"""Partial tuning: methods that choose which entries of the weights may move. A file each, imported by nothing."""
