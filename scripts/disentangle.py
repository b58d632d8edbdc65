#!/usr/bin/env python
"""Exchange one attribute of an entity through a few latents: does it change, and do the others stay?"""

from diagnostics.disentanglement.command import run

if __name__ == "__main__":
    run()
