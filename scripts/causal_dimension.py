#!/usr/bin/env python
"""Count the directions of an activation that the model above it reads, by depth, beside random models and the activations themselves."""

from diagnostics.causal_dimension.command import run

if __name__ == "__main__":
    run()
