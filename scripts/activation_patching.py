#!/usr/bin/env python
"""Patch activations of one prompt into the run of another, cell by cell, beside matched controls."""

from diagnostics.patching.command import run

if __name__ == "__main__":
    run()
