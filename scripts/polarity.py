#!/usr/bin/env python
"""Train signed and unsigned SAEs on planted antipodal pairs: error, anomalies and geometry by polarity."""

from diagnostics.polarity.command import run

if __name__ == "__main__":
    run()
