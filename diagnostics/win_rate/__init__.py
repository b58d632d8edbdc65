"""Which score of a latent predicts its effect more often, and what is behind it?"""
