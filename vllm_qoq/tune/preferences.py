"""What users may prefer.

At every measured size the most accurate set is taken that is at most so much slower than the
fastest one:

    prefer     slower by at most   why
    accuracy   25 %                what a user may notice is worth more than the GPU's time
    balanced    5 %                a smaller gain is lost in attention, norms and sampling
    speed       2 %                measurements differ as much by chance; a tie
"""

SLOWER = {"accuracy": 0.25, "balanced": 0.05, "speed": 0.02}
"""Preference -> how much slower than the fastest set a more accurate one may be."""

DEFAULT = "balanced"
