"""The columns of an atlas."""

from diagnostics.atlas.scores import DRAWS

COLUMNS = {
    "layer": "block, 0-based",
    "point": "where in the block",
    "sae": "name of the SAE in this atlas",
    "prompt": "row of tokens.npy",
    "position": "token's place in the prompt, from 0",
    "latent": "index in the SAE",
    "z": "activation; what is removed is z·d, d the latent's decoder row, and the SAE's error stays",
    "norm": "‖x‖ of the activation at the site",
    "delta_norm": "‖z·d‖, the dose: how far the edit moves x",
    "cosine": "cos(x, d)",
    "inner": "<x, d/‖d‖>",
    "direct": "z·<d, gradient of (logit of clean_top1 − mean logit)> through the final norm and unembedding alone, logits",
    "gradient": "z·<d, gradient of log p(clean_top1) at the site>, nats: first-order estimate of top1_drop",
    "integrated": "the same, mean gradient on the path from x without its active latents to x; nan where not asked for",
    "fisher": "½·mean (z·<d, gradient of log p(y)>)² over y drawn from p, nats: second-order estimate of kl; nan likewise",
    "second_order": "½·Σ_y p(y)·(z·<d, gradient of log p(y)>)² over the whole vocabulary, nats: exact second-order term of kl; nan likewise",
    **{
        f"fisher_{n}": f"fisher by {n} draw{'s' * (n > 1)} of y that a token's latents share; nan likewise"
        for n in DRAWS
    },
    "kl": "exact KL(clean ‖ ablated) of the next-token distribution at this token, nats",
    "kl_direct": "the same, of the change carried straight to the final norm and unembedding, nats",
    "top1_drop": "log p − log q of clean_top1, nats: exact effect on the most likely token",
    "top1_changed": "whether another token is the most likely one now",
    "clean_top1": "id of the most likely next token",
    "top1": "the same after the ablation",
    "clean_entropy": "of the clean next-token distribution, nats",
    "kl_placebo": "KL of a random edit of the same norm and angle (hence the same dose), nats; nan where not asked for",
}
"""The table's columns: a line for each (SAE, token, active latent). Floats are float32, ids int32."""
