#!/usr/bin/env python
"""Ablate the latents of concepts wherever they fire: intended and collateral effects, at equal intended effect."""

from diagnostics.concept_ablation.command import run

if __name__ == "__main__":
    run()
