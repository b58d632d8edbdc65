#!/usr/bin/env python
"""Sparse probing: how well do k latents of an SAE separate classes of texts?"""

from diagnostics.sparse_probing.command import run

if __name__ == "__main__":
    run()
