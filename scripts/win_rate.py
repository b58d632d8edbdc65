#!/usr/bin/env python
"""Does KL follow the cosine or the inner product? The published win rate, its null, and its quartiles with their Simpson labels."""

from diagnostics.win_rate.command import run

if __name__ == "__main__":
    run()
