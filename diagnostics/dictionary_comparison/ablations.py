"""What taking single latents out of single activations does to the model, beside matched placebos."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy import ndarray
from torch import Tensor

from diagnostics.dictionary_comparison.quartiles import Sample
from diagnostics.running.notes import noted
from diagnostics.running.recordings import SHARD, Recordings
from diagnostics.running.units import narrowed
from diagnostics.sampling.latents import draw_active, draw_latents
from diagnostics.sampling.tokens import generator, hash_keys
from diagnostics.statistics.measures import noise_floor
from diagnostics.statistics.tables import PLACEBOS
from interventions.edits import add_direction, matched_placebo, random_like
from interventions.effects import measure
from sae_models.active_latents import ActiveLatents
from sae_models.dictionaries import Dictionary

COLUMNS = {
    "sae": "name of the SAE in this comparison",
    "latent": "index in the SAE",
    "latent_weight": "how many of the SAE's live latents it stands for: those of its bin of log frequency over those drawn from it",
    "prompt": "row of tokens.npy",
    "position": "token's place in the prompt, from 0",
    "activation": "z of the latent at the token",
    "delta_norm": "‖z·d‖, the dose: how far the edit moves x",
    "kl": "KL(clean ‖ x − z·d) of the next token at the token's own position, nats",
    "kl_placebo_token": "the same of a vector with the norm and angle of x − z·d, turned along the difference of two other tokens",
    "kl_placebo_isotropic": "the same, turned in a random direction",
}
"""Of the table of ablations, a line for each SAE × latent × token."""
_SELF = 64


def ablations(
    recordings: Recordings,
    sample: Sample,
    dictionary: Dictionary,
    active: ActiveLatents,
    *,
    latents: int,
    tokens: int,
    seed: int = 0,
    path: str = "auto",
    batch_rows: int | None = None,
    tick: Callable[[int], object] | None = None,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """KL(clean ‖ intervened) of x − z_i·d_i at tokens where latent i is active, and of its two placebos; what was dropped.

    latents: in equal numbers from bins of log frequency, `latent_weight` says how many each stands for. tokens: up to so many of
    each. One line a (latent, token), with `COLUMNS`.
    """
    assert dictionary.sae is not None
    drawn, said = draw_latents(active.frequency(), active.n_tokens, latents, "stratified", seed, dictionary.label)
    weight = dict(zip(drawn.index.tolist(), drawn.weight.tolist(), strict=True))
    parts = []
    for latent in drawn.index:
        own = np.flatnonzero(active.latent == latent)
        at = active.token[own]
        key = hash_keys(seed, f"ablations/{dictionary.label}/{latent}", sample.prompt[at], sample.position[at])
        parts.append(own[draw_active(np.ones(len(own), dtype=bool), key, tokens).index])
    entry = np.concatenate(parts)
    entry = entry[np.argsort(active.token[entry], kind="stable")]
    token, latent = active.token[entry], active.latent[entry]
    table = pd.DataFrame(
        {
            "sae": dictionary.name,
            "latent": latent,
            "latent_weight": [weight[int(i)] for i in latent],
            "prompt": sample.prompt[token],
            "position": sample.position[token],
            "activation": active.z[entry],
        }
    )
    x = sample.x[torch.from_numpy(token).to(sample.x.device)].float()
    z = torch.from_numpy(active.z[entry]).to(x)
    d = dictionary.directions
    edited = add_direction(x, d[torch.from_numpy(latent).to(d.device)].to(x), -z)
    stream = generator(seed, "ablations", dictionary.site, dictionary.label)
    other = torch.randint(len(sample.x), (2, len(x)), generator=stream).to(sample.x.device)
    towards = (sample.x[other[0]].float() - sample.x[other[1]].float(), random_like(x, stream))
    vectors = {"ablated": edited} | {
        name: matched_placebo(x, edited, along) for name, along in zip(PLACEBOS, towards, strict=True)
    }
    table["delta_norm"] = (edited - x).norm(dim=-1).cpu().numpy()
    vectors["self"] = x
    effect, notes = _measured(recordings, dictionary, table, vectors, path, batch_rows, tick)
    for name, values in effect.items():
        table["kl" if name == "ablated" else f"kl_{name}"] = values
    floor = noise_floor(table["kl_self"].dropna().to_numpy(float))
    good = np.isfinite(table[["kl", *(f"kl_{name}" for name in PLACEBOS)]].to_numpy(float)).all(axis=1)
    notes |= {"drawn": said, "noise_floor": floor, "rows": int(good.sum())}
    notes["rows_dropped"] = {"no placebo of this norm and angle, or effect not finite": int((~good).sum())}
    return narrowed(table.loc[good, list(COLUMNS)].reset_index(drop=True)), notes


def _measured(
    recordings: Recordings,
    dictionary: Dictionary,
    table: pd.DataFrame,
    vectors: dict[str, Tensor],
    path: str,
    batch_rows: int | None,
    tick: Callable[[int], object] | None,
) -> tuple[dict[str, ndarray], dict[str, Any]]:
    """KL of each line and edit, some prompts at a time; nan where the edited vector does not exist, or was not asked for."""
    effect = {name: np.full(len(table), np.nan) for name in vectors}
    finite = {name: value.isfinite().all(dim=-1).cpu().numpy() for name, value in vectors.items()}
    finite["self"] &= np.arange(len(table)) % max(1, len(table) // _SELF) == 0  # the noise floor, from some of the rows
    shard = table["prompt"].to_numpy() // SHARD
    notes: dict[str, Any] = {}
    for number in np.unique(shard):
        recording, first = recordings[int(number)], int(number) * SHARD
        line = {name: np.flatnonzero((shard == number) & known) for name, known in finite.items()}
        every = np.concatenate(list(line.values()))
        rows = torch.cat([vectors[name][torch.from_numpy(own).to(vectors[name].device)] for name, own in line.items()])
        prompt, position = (
            torch.from_numpy(table[c].to_numpy()[every].astype(np.int64)) for c in ("prompt", "position")
        )
        how: dict[str, Any] = {"path": path, "nonfinite": "count", "batch_rows": batch_rows, "progress": tick}
        found = measure(recording, dictionary.site, prompt - first, position, rows.to(recordings.model.dtype), **how)
        values = found["kl"].double().numpy()
        for name, own in line.items():
            effect[name][own], values = values[: len(own)], values[len(own) :]
        noted(notes, found)
    return effect, notes
