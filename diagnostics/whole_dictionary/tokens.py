"""Which tokens the removal of each latent raises and lowers, by the direct path."""

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from interventions.direct_logits import direct_logits, token_text
from interventions.recording import Recording

MANY = 5
"""tokens named of each latent"""
_AT_ONCE = 512


def mean_coefficients(rows: pd.DataFrame, d_sae: int) -> Float[ndarray, "d_sae"]:
    """Mean over a latent's rows of −z/s, s what the final norm divides by there; nan without rows."""
    gone = -(rows.z.astype(float) / rows.final_norm.astype(float))
    return gone.groupby(rows.latent).mean().reindex(range(d_sae)).to_numpy(float)


def named_tokens(
    recording: Recording, directions: Float[Tensor, "latent d_model"], coefficient: Float[ndarray, "latent"]
) -> pd.DataFrame:
    """The tokens that each latent's removal raises (`promoted`) and lowers (`suppressed`) most, joined by two spaces.

        mean over rows of −z/s · W_U (g ∘ d̃) √d_model, minus its mean over the vocabulary:

    the change of logits through the final norm, its scale at each token held fixed, and the unembedding alone: what later blocks make
    of the removal is not in it. Empty where the coefficient is nan. Source: direct logit attribution as commonly used.
    """
    tokenizer = recording.model.tokenizer
    found = pd.DataFrame("", index=range(len(directions)), columns=["promoted", "suppressed"])
    some = np.flatnonzero(np.isfinite(coefficient))
    for start in range(0, len(some), _AT_ONCE):
        which = some[start : start + _AT_ONCE]
        at = torch.from_numpy(which).to(directions.device)
        logits = direct_logits(recording, directions[at].float(), 1.0)
        logits *= torch.from_numpy(coefficient[which]).to(logits)[:, None]
        for name, sign in (("promoted", 1), ("suppressed", -1)):
            top = (sign * logits).topk(min(MANY, logits.shape[1])).indices.tolist()
            found.loc[which, name] = ["  ".join(_shown(token_text(i, tokenizer)) for i in line) for line in top]
    return found


def _shown(token: str) -> str:
    """A token without spaces at its ends; spaces and control characters alone as their escapes."""
    plain = token.strip()
    return plain if plain and plain.isprintable() else repr(token)[1:-1] if token != "" else "∅"
