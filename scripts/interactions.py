#!/usr/bin/env python
"""Latents of SAEs edited one by one and together: interactions, concentration, steering, substitution, sparsity of effects."""

from diagnostics.latent_edits.command import run

if __name__ == "__main__":
    run()
