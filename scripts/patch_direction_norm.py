#!/usr/bin/env python
"""Direction-vs-norm patching by depth, in context and in a one-token context, beside matched placebos."""

from diagnostics.direction_vs_norm.command import run

if __name__ == "__main__":
    run()
