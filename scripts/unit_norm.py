#!/usr/bin/env python
"""Set activations to norm 1 after one block, alone or all together, by depth, beside rotations by the same distance."""

from diagnostics.unit_norm.command import run

if __name__ == "__main__":
    run()
