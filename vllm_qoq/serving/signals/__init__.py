"""The signals between an engine and its front end: step counts, the load, and traces."""
