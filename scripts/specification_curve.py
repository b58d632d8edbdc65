#!/usr/bin/env python
"""The claims about direction and norm under every combination of text, context, sink filter, metric, comparison and depth."""

from diagnostics.specifications.command import run

if __name__ == "__main__":
    run()
