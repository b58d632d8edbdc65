"""What is measured: each SAE's error and the model's loss with it spliced in, prompt by prompt; the model's own early exits."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from diagnostics.sae_evaluation.measures import ZERO, first_prompts, passes, reconstructed
from diagnostics.sampling.counted import Tokens
from interventions.models.causal_model import CausalModel
from interventions.recording import Recording, record
from interventions.replaying.replay import entering_at, unembed
from interventions.sites import Site
from interventions.spliced import Spliced, spliced
from sae_models.sae import SAE

LOGITS = 2**24
"""formed at once"""
GROUP = 8
"""prompts whose activations after every block are held at once"""
ON_PROMPT = ("error", "kl", "ce")
"""Sums over a prompt's counted tokens: ‖x − x̂‖²; KL(clean ‖ spliced) and cross-entropy of the next token, nats."""


def prompt_sums(
    tokens: Tokens, saes: Mapping[str, SAE], n_spliced: int, path: str, tick: Callable[[int], object]
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, Bool[Tensor, "prompt pos"], Spliced]:
    """Sums over the counted tokens of each prompt, by SAE (`ON_PROMPT`) and of the text; L0 and silent latents of each SAE; the tokens
    that spliced sums count.

    The text's: `n_tokens`, `variance` Σ‖x − x̄‖² about the mean of all counted tokens, `n_spliced` (tokens of the first `n_spliced`
    prompts that have a next one and a finite KL under every SAE), and `ce_clean`, `kl_zero`, `ce_zero` over these.
    """
    keep, n_prompts = tokens.counted[tokens.strict], len(tokens.inside)
    x = tokens.x[torch.from_numpy(keep).to(tokens.x.device)]
    prompt = tokens.prompt[keep]
    edits: dict[str, Callable[[Tensor], Tensor]] = {ZERO: torch.zeros_like}
    edits |= {name: (lambda y, sae=sae: reconstructed(sae, y).to(y)) for name, sae in saes.items()}
    some = first_prompts(tokens.recording, n_spliced)
    mask = tokens.mask(tokens.strict, n_spliced)
    found = spliced(some, tokens.site, edits, where=mask, path=path, progress=lambda done: tick(done * len(edits)))
    finite = torch.stack([t.isfinite() for name in edits for t in (found.kl[name], found.loss[name])]).all(0)
    usable = mask & finite

    def summed(table: Float[Tensor, "prompt pos"]) -> Float[ndarray, "prompt"]:
        own = torch.where(usable, table.double(), 0.0).sum(1).numpy()
        return np.r_[own, np.zeros(n_prompts - len(own))]

    centred = (x.double() - tokens.mean).square().sum(-1).cpu().numpy()
    text = pd.DataFrame(
        {
            "prompt": np.arange(n_prompts),
            "n_tokens": np.bincount(prompt, minlength=n_prompts),
            "variance": np.bincount(prompt, centred, n_prompts),
            "n_spliced": summed(usable.double()).round().astype(int),
            "ce_clean": summed(found.clean_loss),
            "kl_zero": summed(found.kl[ZERO]),
            "ce_zero": summed(found.loss[ZERO]),
        }
    )
    frames, kinds = [], []
    for name, sae in saes.items():
        error, active, silent = _passed(sae, x)
        sums = {
            "error": np.bincount(prompt, error, n_prompts),
            "kl": summed(found.kl[name]),
            "ce": summed(found.loss[name]),
        }
        frames.append(pd.DataFrame({"sae": name, "prompt": np.arange(n_prompts), **sums}))
        kinds.append({"sae": name, "l0": active, "silent": silent})
    return pd.concat(frames, ignore_index=True), text, pd.DataFrame(kinds), usable, found


def _passed(sae: SAE, x: Float[Tensor, "token d_model"]) -> tuple[Float[ndarray, "token"], float, float]:
    """Squared error of each token, mean number of active latents, share of latents that fire on no token."""
    error, active = [], torch.zeros((), dtype=torch.long, device=x.device)
    fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=x.device)
    for some, z, found in passes(sae, x):
        error.append((x[some].to(found) - found).square().sum(-1).double())
        on = z != 0
        active, fired = active + on.sum(), fired | on.any(0)
    return torch.cat(error).cpu().numpy(), float(active) / len(x), float((~fired).double().mean())


def early_exits(
    model: CausalModel, tokens: Tokens, usable: Bool[Tensor, "prompt pos"], tick: Callable[[int], object]
) -> pd.DataFrame:
    """Cross-entropy of the next token when the model stops after each block: the final norm and the unembedding read its output.

    usable: the tokens counted, of the first prompts. A line for each block and prompt: `ce`, the sum over its `n` tokens. The exits are
    not trained: this is the logit lens.
    """
    sites = [Site(layer) for layer in range(model.n_layers)]
    ids, length, lines = tokens.recording.tokens, tokens.recording.length, []
    for start in range(0, len(usable), GROUP):
        mask = usable[start : start + GROUP]
        some = record(
            model,
            [ids[start + i, : int(length[start + i])].tolist() for i in range(len(mask))],
            sites,
            keep_cache=False,
        )
        row, position = (found.to(some.tokens.device) for found in mask.nonzero(as_tuple=True))
        target, n = some.tokens[row, position + 1], mask.sum(1).tolist()
        for site in sites:
            total = torch.zeros(len(mask), dtype=torch.float64)
            total.index_add_(0, row.cpu(), exit_loss(some, site, row, position, target).double().cpu())
            lines += [
                {"layer": site.layer, "prompt": start + i, "n": n[i], "ce": float(ce)} for i, ce in enumerate(total)
            ]
            tick(len(mask))
    return pd.DataFrame(lines)


@torch.no_grad()
def exit_loss(
    recording: Recording, site: Site, row: Tensor, position: Tensor, target: Tensor
) -> Float[Tensor, "token"]:
    """Cross-entropy of `target` when the final norm reads the residual stream at `site`, nats."""
    model, value = recording.model, recording.activations[site]
    with recording.held(), entering_at(recording, model.n_layers, value):
        hidden = model.base(input_ids=recording.tokens, use_cache=False).last_hidden_state[row, position]
    many = max(1, LOGITS // model.vocab_size)
    return torch.cat(
        [
            torch.nn.functional.cross_entropy(unembed(recording, part).float(), to, reduction="none")
            for part, to in zip(hidden.split(many), target.split(many), strict=True)
        ]
    )


def shares_of_compute(model: CausalModel) -> Float[ndarray, "layer"]:
    """Forward compute of the model that stops after each block, as a share of the whole.

        (Σ_{blocks kept} P_b + P_u) / (Σ_{all blocks} P_b + P_u)

    P: entries of the matrices that a token is multiplied with, of a block and of the unembedding. Attention over earlier tokens, norms
    and the embedding's look-up are left out.
    """
    blocks = np.array(
        [sum(p.numel() for p in block.parameters() if p.ndim >= 2) for block in model.blocks], dtype=float
    )
    head: Any = model.hf.get_output_embeddings()
    unembedding = float(head.weight.numel())
    return (blocks.cumsum() + unembedding) / (blocks.sum() + unembedding)
