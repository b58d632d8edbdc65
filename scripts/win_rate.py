#!/usr/bin/env python
"""Does KL go with the cosine or with the inner product? The published win rate, its null, its quartiles, and what they are called."""

from diagnostics.win_rate.command import run

if __name__ == "__main__":
    run()
