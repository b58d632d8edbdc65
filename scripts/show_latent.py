#!/usr/bin/env python
"""The former name of `latent_card.py`, kept for one release."""

import sys

from diagnostics.cards.command import run

if __name__ == "__main__":
    print(
        "note: show_latent.py is now latent_card.py; the old name will be removed in the next release", file=sys.stderr
    )
    run()
