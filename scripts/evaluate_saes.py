#!/usr/bin/env python
"""Sparse autoencoders judged: reconstruction, sparsity, what the model does with them in its stream, alignment."""

from diagnostics.sae_evaluation.command import run

if __name__ == "__main__":
    run()
