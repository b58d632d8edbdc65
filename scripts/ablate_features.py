#!/usr/bin/env python
"""Ablate the latents of concepts wherever they fire: what was meant beside what was not, at equal intended effect."""

from diagnostics.concept_ablation.command import run

if __name__ == "__main__":
    run()
