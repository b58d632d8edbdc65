"""What is asked by default: numbers of latents."""

KS = (2, 5, 10, 20, 50, 100, 500)
"""Numbers of latents: those of SAEBench."""
