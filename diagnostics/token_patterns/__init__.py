"""Which token patterns make a latent fire?"""
