"""One pass over a text for several SAEs: how often each latent fires, and at which tokens it is measured."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diagnostics.sampling.tokens import TokenFilter, filter_by_norms, hash_keys
from interventions.activations import run_to_sites
from interventions.edits import norm
from interventions.errors import ResultError, one_line
from interventions.files import UNREADABLE, place_first, writing
from interventions.models.causal_model import CausalModel
from interventions.models.fingerprint import depends_on_batch
from interventions.sites import Site
from interventions.texts.prompts import Prompts
from sae_models.active_latents import active_latents
from sae_models.dictionaries import Dictionary

STRATA = 4
"""quarters of a latent's own |z|"""
_BATCH, _BATCH_GPU = 1024, 16_384  # tokens in a forward pass


@dataclass(frozen=True, eq=False)
class Scan:
    """What a text holds of one SAE, and the rows drawn of it, in the order of prompt, position, latent."""

    prompt: Int[ndarray, "row"]
    position: Int[ndarray, "row"]
    latent: Int[ndarray, "row"]
    quartile: Int[ndarray, "row"]
    """of |z| among all the latent's active usable tokens, from 0"""
    z: Float[ndarray, "row"]
    norm: Float[ndarray, "row"]
    """‖x‖ at the site"""
    firings: Int[ndarray, "d_sae"]
    """active usable tokens of each latent"""
    max_z: Float[ndarray, "d_sae"]
    """the largest by size, signed; nan where a latent never fires"""
    median_z: Float[ndarray, "d_sae"]
    usable: Bool[ndarray, "prompt pos"]
    left_out: dict[str, int]
    """numbers of unusable tokens by the first reason that holds"""


@dataclass(frozen=True, eq=False)
class Entries:
    """Active (token, latent) pairs of one SAE, in any order; all `[entry]`."""

    prompt: Int[ndarray, "entry"]
    position: Int[ndarray, "entry"]
    latent: Int[ndarray, "entry"]
    z: Float[ndarray, "entry"]

    def take(self, which: ndarray) -> "Entries":
        """Some of them, by index or mask."""
        return Entries(*(getattr(self, f.name)[which] for f in fields(self)))


def drawn(entries: Entries, quota: int, seed: int) -> tuple[Int[ndarray, "row"], Int[ndarray, "row"]]:
    """Which entries are measured, up to `quota` of each latent, and the quarter of |z| that each is in; ordered by token, then latent.

    Quarters of a latent's own |z| take turns; which begins changes from latent to latent, so that a quota that 4 does not divide favours
    none. Within one, the first tokens of prompts come before second ones, and so on, each in the
    order of a seeded hash of the token: latents share tokens where they can, so that one clean distribution serves several.
    Independent of the order of the entries. Source: ours.
    """
    n = len(entries.latent)
    key = hash_keys(seed, "tokens of latents", entries.prompt, entries.position)
    # Ranks of |z|, of a latent's tokens within a prompt, and of these within a quarter: each a sort by latent first.
    order = np.lexsort((key, np.abs(entries.z), entries.latent))
    count = np.bincount(entries.latent)
    quartile = np.empty(n, dtype=np.int8)
    quartile[order] = STRATA * _places(order, entries.latent) // count[entries.latent[order]]
    order = np.lexsort((key, entries.prompt, entries.latent))
    turn = np.empty(n, dtype=np.int32)
    turn[order] = _places(order, entries.latent, entries.prompt)
    order = np.lexsort((key, turn, quartile, entries.latent))
    place = np.empty(n, dtype=np.int32)
    place[order] = _places(order, entries.latent, quartile)
    order = np.lexsort(((quartile + entries.latent) % STRATA, place, entries.latent))
    chosen = order[_places(order, entries.latent) < quota]
    chosen = chosen[np.lexsort((entries.latent[chosen], entries.position[chosen], entries.prompt[chosen]))]
    return chosen, quartile[chosen]


def _places(order: ndarray, *names: ndarray) -> Int[ndarray, "entry"]:
    """Place of each entry, in this order, among those of equal names, from 0."""
    new = np.zeros(len(order), dtype=bool)
    new[:1] = True
    for name in names:
        along = name[order]
        new[1:] |= along[1:] != along[:-1]
    first = np.flatnonzero(new)
    return np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))


def scanned(
    model: CausalModel,
    prompts: Prompts,
    dictionaries: Sequence[Dictionary],
    *,
    sink_filter: float | None,
    tokens_per_latent: int,
    seed: int,
) -> dict[str, Scan]:
    """Every SAE's scan, by name, from one pass that ends with the deepest of their sites; nothing of it is kept but what is drawn."""
    length = np.array([len(tokens) for tokens in prompts.tokens])
    shape = len(length), int(length.max())
    special = np.zeros(shape, dtype=bool)
    for row, flags in zip(special, prompts.special, strict=True):
        row[: len(flags)] = flags
    norms = {d.site: np.full(shape, np.nan, dtype=np.float32) for d in dictionaries}
    parts: dict[str, list[Entries]] = {d.name: [] for d in dictionaries}
    batch = np.zeros(0, dtype=int)

    def see(site: Site, hidden: Float[Tensor, "prompt pos d_model"]) -> None:
        row, position = np.nonzero(np.arange(hidden.shape[1]) < length[batch][:, None])
        x = hidden[torch.from_numpy(row).to(hidden.device), torch.from_numpy(position).to(hidden.device)]
        prompt, finite = batch[row], x.isfinite().all(dim=-1)
        norms[site][prompt, position] = norm(x)[:, 0].cpu().numpy()
        for d in dictionaries:
            if d.site == site and d.sae is not None:
                active = active_latents(d.sae, torch.where(finite[:, None], x, 0))
                at = prompt[active.token], position[active.token], active.latent
                p, q, latent = (part.astype(np.int32) for part in at)
                parts[d.name].append(Entries(p, q, latent, active.z))

    for batch in _batches(model, length):
        ids = pad_sequence([torch.tensor(prompts.tokens[i]) for i in batch], batch_first=True).to(model.device)
        with torch.no_grad():
            run_to_sites(model, ids, norms, see)
    filters = {site: filter_by_norms([size], length, special, sink_filter) for site, size in norms.items()}
    found = {}
    for d in dictionaries:
        some = parts.pop(d.name)
        every = Entries(*(np.concatenate([getattr(part, f.name) for part in some]) for f in fields(Entries)))
        found[d.name] = _scan(every, norms[d.site], filters[d.site], len(d), tokens_per_latent, seed)
    return found


def _batches(model: CausalModel, length: Int[ndarray, "prompt"]) -> list[Int[ndarray, "prompt"]]:
    """Prompts of similar length, as many as a pass takes; each alone where others of its batch would change it."""
    most = _BATCH if model.device.type == "cpu" else _BATCH_GPU
    left, found = np.argsort(-length, kind="stable"), []
    many = 1 if depends_on_batch(model.hf, int(length.max())) else None
    while len(left):
        n = many or max(1, most // int(length[left[0]]))
        found.append(left[:n])
        left = left[n:]
    return found


def _scan(
    every: Entries, norms: Float[ndarray, "prompt pos"], tokens: TokenFilter, d_sae: int, quota: int, seed: int
) -> Scan:
    usable = tokens.usable
    entries = every.take(usable[every.prompt, every.position])
    firings = np.bincount(entries.latent, minlength=d_sae)
    max_z, median_z = np.full((2, d_sae), np.nan, dtype=np.float32)
    live, end = np.flatnonzero(firings), np.cumsum(firings)
    for values, by in ((max_z, np.abs(entries.z)), (median_z, entries.z)):
        ordered = entries.z[np.lexsort((by, entries.latent))]
        if values is max_z:
            values[live] = ordered[end[live] - 1]
        else:
            low, high = ((end[live] - firings[live]) + (firings[live] - back) // 2 for back in (1, 0))
            values[live] = (ordered[low] + ordered[high]) / 2
    chosen, quartile = drawn(entries, quota, seed)
    own = entries.take(chosen)
    size = norms[own.prompt, own.position]
    return Scan(
        own.prompt, own.position, own.latent, quartile, own.z, size, firings, max_z, median_z, usable, tokens.left_out()
    )


def kept(folder: Path | None, name: str, scan: Callable[[], Mapping[str, Scan]]) -> dict[str, Scan]:
    """The scan kept in a folder under this name: the first that any process put there, whoever asks. Without a folder: scanned.

    Raises `ResultError` for a file that is damaged, or cannot be written.
    """
    if folder is None:
        return dict(scan())
    path = folder / f"scan-{name}.npz"
    if not path.exists():
        found = scan()
        with writing(f"to {folder}"):
            place_first(path, lambda partial: _save(partial, found))
    try:
        return _load(path)
    except (*UNREADABLE, ValueError, KeyError) as error:
        raise ResultError(
            f"{path} is damaged ({one_line(error)}); remove it, and run the same command again"
        ) from error


def _save(path: Path, found: Mapping[str, Scan]) -> None:
    arrays = {}
    for number, scan in enumerate(found.values()):
        arrays |= {f"{number}/{f.name}": getattr(scan, f.name) for f in fields(Scan) if f.name != "left_out"}
    aside = json.dumps({name: scan.left_out for name, scan in found.items()}).encode()
    np.savez(path, about=np.frombuffer(aside, dtype=np.uint8), **arrays)


def _load(path: Path) -> dict[str, Scan]:
    with np.load(path, allow_pickle=False) as file:
        about: dict[str, Any] = json.loads(file["about"].tobytes())
        return {
            name: Scan(
                **{f.name: file[f"{number}/{f.name}"] for f in fields(Scan) if f.name != "left_out"}, left_out=left_out
            )
            for number, (name, left_out) in enumerate(about.items())
        }
