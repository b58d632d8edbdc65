#!/usr/bin/env python
"""Results of any of the commands as one page: figures, tables, caveats, and how to reproduce them."""

from diagnostics.reports.command import run

if __name__ == "__main__":
    run()
