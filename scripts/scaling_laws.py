#!/usr/bin/env python
"""The scaling law of a grid of SAEs in width and active latents, trained on one stream, and the largest width predicted."""

from diagnostics.scaling_laws.command import run

if __name__ == "__main__":
    run()
