#!/usr/bin/env python
"""Show one head or MLP what another writes in the other run of a pair, all else unchanged."""

from diagnostics.edges.command import run

if __name__ == "__main__":
    run()
