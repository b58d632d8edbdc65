#!/usr/bin/env python
"""KL against dose: edits of equal length along directions that differ in meaning, by depth, beside randomly initialised models."""

from diagnostics.dose.command import run

if __name__ == "__main__":
    run()
