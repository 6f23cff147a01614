"""Which set a step runs in: the table of a checkpoint, and when an engine counts as busy."""
