"""Which latents of SAEs are active at which tokens of a text, from passes that end with the deepest site."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import sparse
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diagnostics.sampling.latents import FREQUENCY_BINS, frequency_bins, from_strata
from diagnostics.sampling.tokens import filter_by_norms, hash_keys
from interventions.activations import run_to_sites
from interventions.edits import norm
from interventions.errors import ResultError
from interventions.models.causal_model import CausalModel
from interventions.models.fingerprint import depends_on_batch
from interventions.sites import Site
from interventions.texts.prompts import Prompts
from sae_models.active_latents import active_latents
from sae_models.dictionaries import Dictionary

_BATCH, _BATCH_GPU = 1024, 16_384  # tokens in a forward pass


def run_sequences(
    model: CausalModel,
    sequences: Sequence[Sequence[int]],
    sites: Sequence[Site],
    see: Callable[[Site, Int[ndarray, "sequence"], Float[Tensor, "sequence pos d_model"]], object],
) -> int:
    """Forward passes over sequences of any lengths, each ending with the deepest site; how many there were.

    see: gets a site, the indices of the sequences of a pass, and their activations, padded on the right (positions past a sequence's
    end mean nothing). Sequences of similar length share a pass; each has its own where others of its batch would change it.
    """
    length = np.array([len(tokens) for tokens in sequences])
    most = _BATCH if model.device.type == "cpu" else _BATCH_GPU
    alone = depends_on_batch(model.hf, int(length.max(initial=0)))
    left, passes = np.argsort(-length, kind="stable"), 0
    while len(left):
        n = 1 if alone else max(1, most // int(length[left[0]]))
        which, left, passes = left[:n], left[n:], passes + 1
        ids = pad_sequence([torch.tensor(sequences[i]) for i in which], batch_first=True).to(model.device)
        with torch.no_grad():
            run_to_sites(model, ids, sites, lambda site, hidden, which=which: see(site, which, hidden))
    return passes


@dataclass(frozen=True, eq=False)
class TextLatents:
    """One SAE's latents at the usable tokens of a text, prompt by prompt."""

    prompt: Int[ndarray, "token"]
    position: Int[ndarray, "token"]
    z: sparse.csc_matrix
    """`[token, d_sae]`"""
    readings: Float[ndarray, "token direction"]
    """x · r for each of the directions asked for"""
    usable: Bool[ndarray, "prompt pos"]
    left_out: dict[str, int]
    """numbers of unusable tokens by the first reason that holds"""

    def of(self, latent: int) -> Float[ndarray, "token"]:
        """z of a latent at every usable token."""
        return self.z[:, [latent]].toarray()[:, 0]


def read_latents(
    model: CausalModel,
    prompts: Prompts,
    dictionaries: Sequence[Dictionary],
    sink_filter: float | None,
    directions: Mapping[str, Float[Tensor, "direction d_model"]] | None = None,
) -> dict[str, TextLatents]:
    """Every SAE's latents, by name, at usable tokens (`token_filter`); directions: of some SAEs, by name, read at the same tokens.

    Raises `ResultError` where no token is left at a site.
    """
    length = np.array([len(tokens) for tokens in prompts.tokens])
    shape = len(length), int(length.max())
    special = np.zeros(shape, dtype=bool)
    for row, flags in zip(special, prompts.special, strict=True):
        row[: len(flags)] = flags
    norms = {d.site: np.full(shape, np.nan, dtype=np.float32) for d in dictionaries}
    given = directions or {}
    parts: dict[str, list[tuple[ndarray, Any, ndarray]]] = {d.name: [] for d in dictionaries}

    def see(site: Site, which: ndarray, hidden: Tensor) -> None:
        row, position = np.nonzero(np.arange(hidden.shape[1]) < length[which][:, None])
        x = hidden[torch.from_numpy(row).to(hidden.device), torch.from_numpy(position).to(hidden.device)]
        finite = x.isfinite().all(dim=-1)
        norms[site][which[row], position] = norm(x)[:, 0].cpu().numpy()
        x = torch.where(finite[:, None], x, 0)
        for d in dictionaries:
            if d.site == site and d.sae is not None:
                rows = given.get(d.name, x.new_zeros(0, x.shape[1])).to(x.device)
                read = (x.to(rows.dtype) @ rows.T).float().cpu().numpy()
                parts[d.name].append((which[row] * shape[1] + position, active_latents(d.sae, x).matrix(), read))

    run_sequences(model, prompts.tokens, list(norms), see)
    found = {}
    for d in dictionaries:
        tokens = filter_by_norms([norms[d.site]], length, special, sink_filter)
        if not tokens.usable.any():
            raise ResultError(f"no token is left at {d.site}: {tokens.left_out()}; take another text or sink filter")
        place = np.concatenate([some for some, *_ in parts[d.name]])
        order = np.argsort(place)
        order = order[tokens.usable.ravel()[place[order]]]
        rows = sparse.csr_matrix(sparse.vstack([z for _, z, _ in parts[d.name]]))
        read = np.concatenate([read for *_, read in parts.pop(d.name)])[order]
        prompt, position = np.divmod(place[order], shape[1])
        found[d.name] = TextLatents(
            prompt, position, sparse.csc_matrix(rows[order]), read, tokens.usable, tokens.left_out()
        )
    return found


def held_out_prompts(n: int, share: float, seed: int) -> Bool[ndarray, "prompt"]:
    """Which of n prompts are held out: the round(share · n) of smallest seeded hash, at least one on either side.

    Raises `ResultError` for a share outside (0, 1) and for fewer than two prompts.
    """
    if not 0 < share < 1 or n < 2:
        raise ResultError(f"test_share {share} of {n} prompts; expected a share between 0 and 1 of two prompts or more")
    key = hash_keys(seed, "held-out prompts", np.arange(n))
    return np.argsort(np.argsort(key)) < min(max(round(share * n), 1), n - 1)


@dataclass(frozen=True)
class Asked:
    """One polarity of a latent that is measured. An unsigned latent has one, +1; a signed one has two."""

    latent: int
    polarity: int
    bin: int
    """of frequency, from 0; −1 for a latent that was named"""
    weight: float
    """how many (latent, polarity) it stands for"""
    frequency: float
    """share of the usable fitting tokens at which it is active"""

    @property
    def name(self) -> str:
        """`12` or, for a negative polarity, `-12`."""
        return f"{'-' * (self.polarity < 0)}{self.latent}"


def ask_latents(
    text: TextLatents,
    fit: Bool[ndarray, "token"],
    dictionary: Dictionary,
    latents: int | Sequence[int],
    least: int,
    seed: int,
) -> tuple[list[Asked], dict[str, Any]]:
    """Latents to measure, each polarity on its own: so many, in equal numbers from bins of log frequency, or those named.

    One is eligible that is active at `least` fitting tokens or more, and at one held-out token. Returns also what is to be said of the
    draw. Raises `ResultError` for latents named that are not eligible or do not exist, and where none is.
    """
    d_sae = len(dictionary)
    counts = {}
    for name, side in (("fit", fit), ("test", ~fit)):
        z = text.z[np.flatnonzero(side)]
        counts[name] = np.concatenate([np.asarray((z > 0).sum(0)).ravel(), np.asarray((z < 0).sum(0)).ravel()])
    rare, unseen = counts["fit"] < least, counts["test"] == 0
    able, never = ~rare & ~unseen, (counts["fit"] + counts["test"]).reshape(2, -1).sum(0) == 0
    frequency = np.where(able, counts["fit"] / max(1, int(fit.sum())), 0.0)
    fires = counts["fit"] + counts["test"] > 0
    said: dict[str, Any] = {
        "latents": d_sae, "never fire": int(never.sum()), f"active at fewer than {least} fitting tokens": int((fires & rare).sum()),
        "active at no held-out token": int((fires & ~rare & unseen).sum()), "eligible": int(able.sum()),
    }  # fmt: skip
    if not isinstance(latents, int):
        chosen = [i for latent in latents for i in (latent, latent + d_sae) if 0 <= latent < d_sae and able[i]]
        if bad := [i for i in latents if not 0 <= i < d_sae or not able[[i, i + d_sae]].any()]:
            raise ResultError(
                f"latents {bad} of {dictionary.name} do not exist (it has {d_sae}), or are active at fewer than {least} fitting "
                "tokens or at no held-out one; give more text, or other latents"
            )
        bins, index, weight = np.full(2 * d_sae, -1), np.array(chosen), np.ones(len(chosen))
    else:
        bins, edges = frequency_bins(frequency)
        drawn = from_strata(bins, hash_keys(seed, f"latents/{dictionary.label}", np.arange(2 * d_sae)), latents)
        index, weight = drawn.index, drawn.weight
        said |= {
            "frequency edges": edges.tolist(),
            "drawn of each bin": np.bincount(bins[index], minlength=FREQUENCY_BINS).tolist(),
        }
    if not len(index):
        raise ResultError(f"no latent of {dictionary.name} to ask about: {said}; give more text")
    asked = [
        Asked(int(i % d_sae), 1 if i < d_sae else -1, int(bins[i]), float(w), float(frequency[i]))
        for i, w in zip(index, weight, strict=True)
    ]
    return asked, said | {"drawn": len(asked)}
