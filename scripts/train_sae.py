#!/usr/bin/env python
"""Training of sparse autoencoders at several sites, from one pass over a text."""

from diagnostics.commands.train_sae import run

if __name__ == "__main__":
    run()
