"""The choice of the set that the current step of an engine runs in."""
