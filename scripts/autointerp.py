#!/usr/bin/env python
"""Let a judge explain latents from their examples, and test it on held-out snippets."""

from diagnostics.auto_interpretation.command import run

if __name__ == "__main__":
    run()
