#!/usr/bin/env python
"""Figures by depth from results of any command: several models, texts and SAEs in one panel."""

from diagnostics.by_depth.command import run

if __name__ == "__main__":
    run()
