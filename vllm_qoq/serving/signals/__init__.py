"""What the engine tells of itself: step counts, metrics, traces, and how long its queue is."""
