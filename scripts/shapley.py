#!/usr/bin/env python
"""Patch every coalition of some heads and MLPs, and divide the joint effect among them."""

from diagnostics.coalitions.command import run

if __name__ == "__main__":
    run()
