"""Which set the current step of the engine runs in."""
