#!/usr/bin/env python
"""Sparse probing: how well do k latents of an SAE tell labelled texts apart?"""

from diagnostics.sparse_probing.command import run

if __name__ == "__main__":
    run()
