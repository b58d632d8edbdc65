"""Which tokens and latents are measured, drawn once by seeded hash."""
