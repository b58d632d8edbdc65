#!/usr/bin/env python
"""Results of any of the commands as one page: figures, tables, what to know before believing them, how to make them again."""

from diagnostics.reports.command import run

if __name__ == "__main__":
    run()
