#!/usr/bin/env python
"""Dictionaries of one site compared: matched and unique latents, norm detectors, stability over seeds, alignment and effect."""

from diagnostics.dictionary_comparison.command import run

if __name__ == "__main__":
    run()
