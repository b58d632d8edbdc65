"""Which tokens and latents are asked about, drawn once by seeded hash."""
