#!/usr/bin/env python
"""Evaluation of SAEs: reconstruction, sparsity, the model's loss with them spliced in, alignment."""

from diagnostics.sae_evaluation.command import run

if __name__ == "__main__":
    run()
