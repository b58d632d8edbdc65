"""Which latents matter: every active latent of every token is removed once, beside the scores that could have predicted its effect."""
