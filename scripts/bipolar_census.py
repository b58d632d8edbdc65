#!/usr/bin/env python
"""Count latents that take both signs on a text, beside random directions that fire as often."""

from diagnostics.polarity.census_command import run

if __name__ == "__main__":
    run()
