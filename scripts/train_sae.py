#!/usr/bin/env python
"""Sparse autoencoders of several sites, trained on one pass over a text."""

from diagnostics.commands.train_sae import run

if __name__ == "__main__":
    run()
