#!/usr/bin/env python
"""The former name of `evaluate_saes.py`, kept for one release."""

import sys

from diagnostics.sae_evaluation.command import run

if __name__ == "__main__":
    print(
        "note: eval_sae.py is now evaluate_saes.py; the old name will be removed in the next release", file=sys.stderr
    )
    run()
