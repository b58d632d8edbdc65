#!/usr/bin/env python
"""Ablate everything outside a circuit, then the circuit itself, beside random circuits of the same size."""

from diagnostics.edges.circuit_command import run

if __name__ == "__main__":
    run()
