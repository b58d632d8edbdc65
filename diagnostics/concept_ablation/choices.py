"""What may be asked: rankings, arms, numbers of latents."""

RANKINGS = ("mean_difference", "probe", "attribution")
"""`mean_difference`: (mean |z_i| on tokens of the concept − on others)·‖d_i‖. `probe`: <w, d_i>·(mean z_i on tokens of the concept −
on others), w the concept's linear probe. `attribution`: first-order fall of the target logit when z_i·d_i is subtracted wherever the
latent fires in the concept's texts."""

ARMS = ("selected", "random", "placebo", "keep")
"""`selected`: subtracts z_i·d_i of the top N latents of the ranking wherever they fire; the SAE's error is kept. `random`: the same for as
many other latents that are active on the concept's texts, each of similar expected dose. `placebo`: at each token an edit of the same
norm and angle as the selected one, turned towards one direction for the whole text, the difference of two other tokens' activations.
`keep`: subtracts all active latents but the top N (N = 0: all); the error is kept."""

COUNTS = (1, 2, 5, 10, 20, 50, 100, 500)
"""N. Source: arXiv:2606.15054."""
