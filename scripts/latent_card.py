#!/usr/bin/env python
"""Cards of latents: when each fires, what it adds, what the model does without it, its nearest latents; one page each."""

from diagnostics.cards.command import run

if __name__ == "__main__":
    run()
