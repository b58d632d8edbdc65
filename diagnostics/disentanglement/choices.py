"""What is asked by default: numbers of latents."""

KS = (4, 16, 64, 256)
