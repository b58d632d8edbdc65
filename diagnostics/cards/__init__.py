"""What is this latent? Where it fires, what it adds, what the model does without it, and its neighbours."""
