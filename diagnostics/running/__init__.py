"""How runs work: clean activations, rows, resumable units."""
