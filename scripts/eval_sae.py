#!/usr/bin/env python
"""`evaluate_saes.py` under its former name, for one release."""

from diagnostics.sae_evaluation.command import run

if __name__ == "__main__":
    run()
