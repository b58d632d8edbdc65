"""What each kind of result asks, in a line."""

QUESTIONS: dict[str, tuple[str, str]] = {
    "direction_norm": ("Direction and norm", "Does the model read an activation's direction or its norm?"),
    "dose_response": ("Dose and response", "How far must an activation move, and which way, before the output changes?"),
    "unit_norm": ("Unit norm", "What is lost when activations keep their direction and all have norm 1?"),
    "specification": ("Specification curve", "Do the claims about direction and norm survive the choices behind them?"),
    "sae_evaluation": ("SAE evaluation", "How well do SAEs stand for the activations they read?"),
    "projections": ("Ablated directions", "Does the effect of removing a direction go with the cosine or with the inner product?"),
    "win_rate": ("Win rate of the cosine", "How often does a latent's effect correlate more with its cosine than with its inner product?"),
    "atlas": ("Causal atlas", "What does removing each active latent do, and which cheap score could have told?"),
    "feature_ablation": ("Feature ablation", "Do a concept's latents take away the concept and nothing else?"),
    "sparse_probing": ("Sparse probing", "How much of a class do k latents hold?"),
    "dictionary_comparison": ("Dictionaries compared", "Which latents do dictionaries share, and what sets their own apart?"),
    "interactions": ("Interactions", "Do two latents of a token act independently?"),
    "causal_concentration": ("Causal concentration", "How many of a token's latents carry its effect, and do single effects add up?"),
    "latent_steering": ("Steering", "What do latents do that are added more and more strongly, alone and jointly?"),
    "atom_substitution": ("Substitution", "Does another atom in a latent's place change less than deleting it at equal dose?"),
    "ablation_sparsity": ("Sparsity of effects", "How many logits, and how many later tokens, does an ablation reach?"),
}  # fmt: skip
"""By the name of the kind's files: a title, and the question."""
