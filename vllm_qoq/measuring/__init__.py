"""Seconds of a call, on a GPU (`gpu`) and on the CPU (`host`)."""
