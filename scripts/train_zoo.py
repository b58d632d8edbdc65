#!/usr/bin/env python
"""Training of the zoo: SAEs of the packaged model at three depths, from one pass over the packaged text."""

from diagnostics.commands.train_zoo import run

if __name__ == "__main__":
    run()
