"""A captioning job that is ended again and again, by kills, signals and a full disk."""

import random

import caption_soak


def test_nothing_is_lost_or_doubled_whatever_ends_a_job(tmp_path):
    """`python tests/support/caption_soak.py --kills 50` does it for longer."""
    print(caption_soak.main(tmp_path, kills=6, seed=random.randrange(1 << 30)))
