#!/usr/bin/env python
"""The former name of `probe_saes.py`, kept for one release."""

import sys

from diagnostics.sparse_probing.command import run

if __name__ == "__main__":
    print("note: probe.py is now probe_saes.py; the old name will be removed in the next release", file=sys.stderr)
    run()
