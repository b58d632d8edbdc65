#!/usr/bin/env python
"""Find the token patterns that make latents fire, and judge them on held-out text beside single tokens and random directions."""

from diagnostics.token_patterns.command import run

if __name__ == "__main__":
    run()
