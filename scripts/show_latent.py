#!/usr/bin/env python
"""`latent_card.py` under its former name, for one release."""

from diagnostics.cards.command import run

if __name__ == "__main__":
    run()
