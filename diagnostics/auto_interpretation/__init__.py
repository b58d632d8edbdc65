"""Can a judge who sees a latent's examples tell where it fires?"""
