#!/usr/bin/env python
"""`probe_saes.py` under its former name, for one release."""

from diagnostics.sparse_probing.command import run

if __name__ == "__main__":
    run()
