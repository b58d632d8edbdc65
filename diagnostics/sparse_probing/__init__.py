"""How much of a class do a few latents of an SAE hold?"""
