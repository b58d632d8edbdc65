"""A tiny model and an SAE for tests of cards, with a dead latent and, if asked, latents of either sign."""

import functools
from typing import Any

import numpy as np
import pandas as pd
import torch

from diagnostics.cards.run import latent_cards
from interventions import Site, record, wrap
from interventions.models.causal_model import CausalModel
from sae_models.architectures import build, named
from sae_models.dictionaries import dictionaries_of
from sae_models.sae import SAE
from sae_models.selectors import AbsTopK
from tests.tiny import D_MODEL, fresh, prompts, tokenizer

SITE = Site(2)
PROMPTS = prompts(tuple(14 + (7 * i) % 11 for i in range(24)))
DEAD, D_SAE = 5, 40
OPTIONS: dict[str, Any] = {"sink_filter": None, "context_tokens": 12, "top": 5, "few": 2}


@functools.cache
def model() -> CausalModel:
    return wrap(fresh("llama"), tokenizer(), name="tiny")


@functools.cache
def activations() -> torch.Tensor:
    """At every token, `[token, d_model]`."""
    recording = record(model(), PROMPTS, [SITE], keep_cache=False)
    x = recording.activations[SITE]
    return torch.cat([x[i, :n] for i, n in enumerate(recording.length.tolist())])


def sae(signed: bool = False, seed: int = 3) -> SAE:
    """About a fifth of the latents active at a token; `DEAD` never."""
    generator = torch.Generator().manual_seed(seed)
    x = activations()
    found = build(named("standard:relu"), D_SAE, 6, x, generator, model_name="tiny", hook_name=SITE.hook_name)
    found.requires_grad_(False)
    found.W_dec.mul_(torch.linspace(0.5, 2, D_SAE)[:, None])  # rows of any length
    found.score.W_enc.add_(0.2 * torch.randn(D_SAE, D_MODEL, generator=generator))
    score = found.score(found.centred(x), found.W_dec)
    assert found.score.b_enc is not None
    found.score.b_enc.sub_(score.quantile(0.8, dim=0))
    if signed:
        found.score.b_enc.zero_()
        found.selector = AbsTopK(6)
        found.score.W_enc[DEAD] = 0
    else:
        found.score.b_enc[DEAD] = -1e6
    return found


def permuted(given: SAE, order: torch.Tensor) -> SAE:
    """The same latents in another order."""
    other = sae()
    for name, value in given.state_dict().items():
        own = other.state_dict()[name]
        own.copy_(value[order] if len(value) == D_SAE and name != "b_dec" else value)
    return other


def cards(latents: Any, **options: Any):
    return latent_cards(model(), options.pop("sae", None) or sae(), latents, PROMPTS, **(OPTIONS | options))


def usable() -> np.ndarray:
    """Neither the first of a prompt nor the tokenizer's special tokens, written out."""
    special = model().tokenizer.all_special_ids
    return np.array([i > 0 and t not in special for ids in PROMPTS for i, t in enumerate(ids)])


def of_tokens() -> tuple[np.ndarray, np.ndarray]:
    """Prompt and position of every token."""
    return tuple(np.array([at for i, ids in enumerate(PROMPTS) for at in ((i, j) for j in range(len(ids)))]).T)  # pyright: ignore[reportReturnType]


class Table:
    """An atlas as cards read it: rows of some latents, their effects made up, everything else measured."""

    def __init__(self, given: SAE, latents: list[int], name: str = "named there"):
        dictionary = dictionaries_of({name: given}, model(), None)[0]
        z = given.encode(activations()).numpy()
        z[~usable()] = 0
        token, latent = np.nonzero(z[:, latents])
        latent = np.array(latents)[latent]
        prompt, position = of_tokens()
        values = z[token, latent]
        self.frame = pd.DataFrame(
            {"layer": SITE.layer, "point": SITE.point, "sae": name, "prompt": prompt[token], "position": position[token], "latent": latent,
             "z": values, "delta_norm": np.abs(values), "kl": np.abs(values) * (latent + 1), "kl_direct": 0.5, "top1_changed": False,
             "top1": 1, "clean_top1": 2}
        )  # fmt: skip
        self.tokens = [list(ids) for ids in PROMPTS]
        known = {"weights_sha256": model().weights_hash, "model": "tiny"}
        self.provenance = known | {"saes": {name: dictionary.provenance()}, "text": {"name": "given"}}
