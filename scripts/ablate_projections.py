#!/usr/bin/env python
"""Ablate single directions of SAEs at single tokens: effects beside doses, matched placebos and every score proposed to predict them."""

from diagnostics.projections.command import run

if __name__ == "__main__":
    run()
