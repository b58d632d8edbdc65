#!/usr/bin/env python
"""Ablate the latents of a class, or of a spurious attribute: which probes lose accuracy, and which gain it?"""

from diagnostics.probe_perturbation.command import run

if __name__ == "__main__":
    run()
