"""What do edits of single latents do: interactions, concentration, steering, substitution, sparsity of effects?"""
