"""The algebra of changes: representations of an update to one parameter, and whole deltas on disk."""
