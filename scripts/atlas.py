#!/usr/bin/env python
"""The causal atlas: every active latent of every token ablated once, exactly, beside the cheap scores that estimate its effect."""

from diagnostics.atlas.command import run

if __name__ == "__main__":
    run()
