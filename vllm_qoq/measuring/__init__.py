"""Timing of calls, on a GPU (`gpu`) and on the CPU (`host`)."""
