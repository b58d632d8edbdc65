#!/usr/bin/env python
"""The causal atlas: every active latent of every token removed once, exactly, beside the cheap scores that could have told."""

from diagnostics.atlas.command import run

if __name__ == "__main__":
    run()
