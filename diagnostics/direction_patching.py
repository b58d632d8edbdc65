"""Does the model read an activation's direction or its norm? Direction and norm patches between tokens of different prompts.

Source of the patches: arXiv:2606.15054. In-context patching, doses, matched placebos and the statistics are ours.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diagnostics import statistics
from diagnostics.direction_summary import NOTE, SCALES, group_statistics, short_frame, summary_frame
from diagnostics.results import model_provenance
from diagnostics.sampling import Pairs, TokenFilter, cross_prompt_pairs, generator, matching_pairs, token_filter
from interventions.anatomy import check_site
from interventions.edits import (
    angle_between,
    cosine,
    matched_placebo,
    norm,
    random_like,
    replace,
    rescale,
    rotate_by_distance,
    swap_direction,
    swap_norm,
)
from interventions.effects import Effects, measure
from interventions.errors import ResultError
from interventions.models import CausalModel, wrap
from interventions.recording import Recording, record
from interventions.rows import Reference
from interventions.sites import Site
from interventions.texts import Prompts, as_prompts

CONTEXTS = ("in_place", "single_token")
"""`in_place`: B's own prompt, B's own position. `single_token`: the vector as the only token, id 0, as in the paper."""
PAIR_SETS = ("random", "same_norm", "high_cosine", "scale_rotate")
METRICS = ("kl", "js", "clean_entropy", "top1_changed")

PATCHES = ("direction", "norm", "full", "placebo_direction", "placebo_token", "placebo_norm")
"""`direction`: A's direction, B's norm. `norm`: B's direction, A's norm. `full`: x_A itself. `placebo_direction`: the direction
patch's norm and angle, along a random tangent; `placebo_token`: along the difference of two other tokens' activations.
`placebo_norm`: B turned along a random tangent by the norm patch's distance."""
EDITS = {
    "random": (*PATCHES, "self"),
    "same_norm": PATCHES,
    "high_cosine": PATCHES,
    "scale_rotate": (*(f"scale_{s:g}" for s in SCALES), "random_direction", "rotate_like_0.5", "rotate_like_2"),
}
"""Edits by pair set. `self`: A = B, the noise floor. `scale_s`: s·x. `random_direction`: a random direction of the same norm.
`rotate_like_s`: x turned along a random tangent by the distance of `scale_s` (for 5 it would pass 2‖x‖: there is none)."""


@dataclass(frozen=True)
class DirectionNorm:
    """What patching direction, norm and their placebos did, row by row, and how it was made."""

    frame: pd.DataFrame
    """one row per layer × context × pair × edit; columns as in `COLUMNS`"""
    tokens: list[list[int]]
    """the prompts, as token ids, that the prompt and position columns refer to"""
    provenance: dict[str, Any]
    """model, text, settings, counts of what was dropped, which path ran and how exact it was"""

    @classmethod
    def load(cls, folder: str | Path) -> "DirectionNorm":
        """A result as the command wrote it. Raises `ResultError` when the folder does not hold one."""
        folder = Path(folder)
        try:
            frame = pd.read_parquet(folder / "direction_norm.parquet")
            provenance = json.loads((folder / "direction_norm.json").read_text(encoding="utf-8"))["provenance"]
            tokens = [[int(t) for t in row if t >= 0] for row in np.load(folder / "tokens.npy")]
        except FileNotFoundError as error:
            raise ResultError(
                f"{folder} holds no direction-norm result: {Path(error.filename).name} is missing"
            ) from error
        return cls(frame, tokens, provenance)

    def to_frame(self) -> pd.DataFrame:
        """The tidy table."""
        return self.frame

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Statistics of each layer × context × pair set, with delete-one-prompt jackknife intervals.

        Intervals from fewer than 20 prompts are too narrow; `n_prompts` says how many stand behind each.
        """
        keys, found = ["layer", "context", "pair_set"], []
        floors = self.frame[self.frame.edit == "self"].groupby(["layer", "context"])["kl"].agg(statistics.noise_floor)
        log_vocab = float(np.log(self.provenance["vocab"]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few prompts: their number stands beside each interval
            for key, rows in self.frame.groupby(keys, sort=False):
                layer, context, pair_set = cast(tuple[int, str, str], key)
                name = {"layer": layer, "context": context, "pair_set": pair_set}
                found.append({**name, **group_statistics(rows, float(floors.get((layer, context), 0.0)), log_vocab)})
        return found

    def summary(self, pair_set: str = "random") -> pd.DataFrame:
        """One row per layer and context: mean KL (nats) and dose ‖Δx‖/‖x‖ of the patches, ratios, each with its interval."""
        return summary_frame([group for group in self.groups if group["pair_set"] == pair_set])

    def table(self) -> str:
        """The summary of the random pairs as text, for a terminal."""
        return "\n".join([self._short.to_string(index=False), NOTE, *self._left_out()])

    def as_dict(self) -> dict[str, Any]:
        """Summary and provenance, as they stand in the JSON file."""
        return {"summary": self.groups, "provenance": self.provenance}

    def plot(self) -> Any:
        """The figure: KL by depth above, ratios below. Returns a matplotlib Figure."""
        from diagnostics.plots import plot_direction_norm

        return plot_direction_norm(self)

    def _repr_html_(self) -> str:
        return f"{self._short.to_html(index=False)}<p>{NOTE}</p>"

    def _left_out(self) -> list[str]:
        """What the reader must know is missing, and what served instead of replay."""
        p = self.provenance
        few = [
            f"{name} {found['used']} of {found['asked']} at block {layer}"
            for name, by_layer in p["pair_sets"].items()
            for layer, found in by_layer.items()
            if "exist" in found and found["used"] < found["asked"]
        ]
        said = {"fewer pairs than asked": "; ".join(few), "full forward passes": p["why_hooks"]}
        said |= {"pairs dropped": p["pairs_dropped"], "rows dropped": p["rows_dropped"]}
        return [f"{what}: {which}" for what, which in said.items() if which]

    @property
    def _short(self) -> pd.DataFrame:
        return short_frame([group for group in self.groups if group["pair_set"] == "random"])


COLUMNS = (
    "layer", "pair", "pair_set", "edit", "context", "target_prompt", "target_position", "source_prompt",
    "source_position", "target_norm", "source_norm", "cosine", "delta_norm", "delta_angle", "kl", "js", "clean_entropy",
    "top1_changed",
)  # fmt: skip
"""Of the table. pair: index within its pair set, the same pair at every layer for `random` and `scale_rotate`; source columns
are −1 and empty for `scale_rotate`. Norms and delta_norm = ‖Δx‖ are L2 norms, delta_angle is in radians, kl, js and
clean_entropy in nats. Models with LayerNorm have `norm_read` = ‖x − mean(x)‖ of the target too."""


@torch.no_grad()
def direction_norm(
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    pairs: int = 500,
    context: str = "in_place",
    sink_filter: float | None = 10.0,
    seed: int = 0,
    pair_sets: Sequence[str] = PAIR_SETS,
    batch_rows: int | None = None,
    path: str = "auto",
    cache_bytes: int = 4 * 2**30,
    progress: Callable[[int, int], object] | None = None,
) -> DirectionNorm:
    """Patch direction and norm at `resid_post` of some blocks, between tokens of different prompts, beside matched placebos.

        direction  (x_A/‖x_A‖)·‖x_B‖        norm  (x_B/‖x_B‖)·‖x_A‖        effect  KL(clean ‖ intervened) at B, in nats

    model: anything `wrap` takes. prompts: `tokenize`'s, token ids, or texts for the model's tokenizer. layers: block
    indices (default six, from first to last). pairs: token pairs of each set, drawn once by seeded hash and the same at
    every depth; a pair with a token at position 0, a special token, a sink (‖x‖ > sink_filter·median at any of the
    layers), a norm of 0 or a non-finite activation is dropped and counted, never redrawn. context: one of `CONTEXTS`,
    or `both`. path: see `measure`. cache_bytes: keys and values kept at once; beyond that prompts are recorded again.
    progress: called with (rows done, rows in all).

    Raises `SiteError` for a layer that does not exist, `TextError` for prompts that do not serve, `ResultError` when no
    pair is left. Source: arXiv:2606.15054; in context, placebos, doses and intervals are ours.
    """
    model = wrap(model)
    layers = _default_layers(model.n_layers) if layers is None else list(dict.fromkeys(layers))
    sites = [Site(layer) for layer in layers]
    for site in sites:
        check_site(model, site)
    contexts = CONTEXTS if context == "both" else (context,)
    for given, known in ((contexts, CONTEXTS), (pair_sets, PAIR_SETS)):
        if wrong := [x for x in given if x not in known]:
            raise ResultError(f"no {wrong[0]!r}; known: {', '.join(known)}" + (", both" if known is CONTEXTS else ""))
    if not layers or not pair_sets:
        raise ResultError(f"layers {list(layers)}, pair sets {list(pair_sets)}; give at least one of each")
    if pairs < 1:
        raise ResultError(f"{pairs} pairs asked for; ask for at least one")
    prompts = as_prompts(prompts, model.tokenizer)
    length = np.array([len(tokens) for tokens in prompts.tokens])
    drawn = cross_prompt_pairs(length, pairs, seed)
    shards = _record_shards(model, prompts.tokens, sites, cache_bytes if "in_place" in contexts else 0)
    activations = {site: _joined([shard.activations[site] for shard in shards.recordings]) for site in sites}
    special = np.zeros((len(length), length.max()), dtype=bool)
    for row, flags in zip(special, prompts.special, strict=True):
        row[: len(flags)] = flags
    usable = token_filter(list(activations.values()), length, special, sink_filter)
    keep, dropped = usable.keep(drawn)
    if not keep.any():
        raise ResultError(
            f"none of {pairs} pairs is left, dropped: {_nonzero(dropped)}; give other text or a looser sink filter"
        )
    plan = _Plan(model, activations, seed, length, usable, drawn, keep, pairs, pair_sets)
    total = len(contexts) * sum(plan.n_rows(site) for site in sites)
    run = _Run(plan, batch_rows, path, (lambda n: progress(n, total)) if progress else None)
    if "in_place" in contexts:
        for number in range(len(shards.recordings)):
            recording, first = shards.with_cache(number)
            for site in sites:
                run.in_place(recording, first, site)
    if "single_token" in contexts:
        alone = record(model, [[0]])
        for site in sites:
            run.single_token(alone, site)
    frame = run.frame(layers, contexts)
    provenance = {
        "diagnostic": "direction_norm",
        **model_provenance(model),
        "text": prompts.provenance,
        "site": "resid_post",
        "layers": layers,
        "context": list(contexts),
        "pairs_asked": pairs,
        "pair_sets": plan.found,
        "prompts": len(length),
        "tokens": int(length.sum()),
        "sink_filter": sink_filter,
        "seed": seed,
        "pairs_dropped": _nonzero(dropped),
        "rows": len(frame),
        "rows_dropped": _nonzero(run.dropped),
        **run.paths(),
    }
    return DirectionNorm(frame, prompts.tokens, provenance)


def _default_layers(n: int) -> list[int]:
    return sorted({0, n // 4, n // 2, 3 * n // 4, max(n - 2, 0), n - 1})


def _nonzero(counts: dict[str, int]) -> dict[str, int]:
    return {reason: n for reason, n in counts.items() if n}


def _joined(parts: list[Tensor]) -> Tensor:
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, width - part.shape[1])) for part in parts])


@dataclass
class _Shards:
    """Recordings of a few prompts each; keys and values kept where they fit, recorded again where they do not."""

    model: CausalModel
    tokens: list[list[int]]
    size: int
    recordings: list[Recording]

    def with_cache(self, number: int) -> tuple[Recording, int]:
        """A recording with keys and values, and the number of its first prompt."""
        first, recording = number * self.size, self.recordings[number]
        if recording.keys is None:
            recording = record(self.model, self.tokens[first : first + self.size])
        return recording, first


def _record_shards(model: CausalModel, tokens: list[list[int]], sites: list[Site], cache_bytes: int) -> _Shards:
    size, kept, recordings = 64, 0, []
    for first in range(0, len(tokens), size):
        recording = record(model, tokens[first : first + size], sites, keep_cache=kept < cache_bytes)
        kept += sum(t.nbytes for t in (recording.keys or []) + (recording.values or []))
        recordings.append(recording)
    return _Shards(model, tokens, size, recordings)


class _Plan:
    """Which rows there are at each site, and their vectors: the same whatever order they are asked for in."""

    def __init__(
        self,
        model: CausalModel,
        activations: dict[Site, Tensor],
        seed: int,
        length: np.ndarray,
        usable: TokenFilter,
        drawn: Pairs,
        keep: np.ndarray,
        asked: int,
        pair_sets: Sequence[str],
    ):
        self.model, self.activations, self.seed = model, activations, seed
        self.pairs: dict[tuple[Site, str], tuple[Pairs, np.ndarray]] = {}
        self.found: dict[str, Any] = {}
        numbers = np.flatnonzero(keep)
        for name in pair_sets:
            by_layer = {}
            for site, x in activations.items():
                if name in ("random", "scale_rotate"):
                    self.pairs[site, name] = drawn.take(keep), numbers
                    by_layer[site.layer] = {"asked": asked, "used": len(numbers)}
                else:
                    some, n = matching_pairs(x, usable.usable, length, asked, seed, name)
                    self.pairs[site, name] = some, np.arange(len(some))
                    by_layer[site.layer] = {"asked": asked, "exist": n, "used": len(some)}
            self.found[name] = by_layer
        token_prompt, token_position = np.nonzero(usable.usable)
        self.tokens = token_prompt, token_position

    def n_rows(self, site: Site) -> int:
        return sum(len(pairs) * len(EDITS[name]) for (s, name), (pairs, _) in self.pairs.items() if s == site)

    def at(self, site: Site, prompt: np.ndarray, position: np.ndarray) -> Tensor:
        x = self.activations[site]
        return x[torch.from_numpy(prompt).to(x.device), torch.from_numpy(position).to(x.device)]

    def rows(self, site: Site, name: str, among: np.ndarray | None = None) -> tuple[pd.DataFrame, Tensor, Tensor]:
        """Table of rows (pair-major), edited vectors `[pair, edit, d_model]` and clean targets `[pair, d_model]`.

        among: prompts whose tokens are targets (default all).
        """
        pairs, numbers = self.pairs[site, name]
        chosen = np.arange(len(pairs)) if among is None else np.flatnonzero(np.isin(pairs.target_prompt, among))
        noise = self._tangents(site, name, len(pairs), chosen)
        pairs, numbers = pairs.take(chosen), numbers[chosen]
        x = self.at(site, pairs.target_prompt, pairs.target_position)
        a = None if name == "scale_rotate" else self.at(site, pairs.source_prompt, pairs.source_position)
        edited = torch.stack([_edit(edit, x, a, *noise) for edit in EDITS[name]], dim=1)
        n = len(EDITS[name])
        table = pd.DataFrame(
            {
                "layer": site.layer,
                "pair": numbers.repeat(n),
                "pair_set": name,
                "edit": list(EDITS[name]) * len(pairs),
                "target_prompt": pairs.target_prompt.repeat(n),
                "target_position": pairs.target_position.repeat(n),
                "source_prompt": -1 if a is None else pairs.source_prompt.repeat(n),
                "source_position": -1 if a is None else pairs.source_position.repeat(n),
                "target_norm": _column(norm(x).squeeze(-1), n),
                "source_norm": np.nan if a is None else _column(norm(a).squeeze(-1), n),
                "cosine": np.nan if a is None else _column(cosine(x, a), n),
                "delta_norm": _column((edited.float() - x.float()[:, None]).norm(dim=-1)),
                "delta_angle": _column(angle_between(x[:, None].expand_as(edited), edited)),
            }
        )
        if self.model.norm_kind == "LayerNorm":
            wide = x.float()
            table["norm_read"] = _column((wide - wide.mean(-1, keepdim=True)).norm(dim=-1), n)
        return table, edited, x

    def _tangents(self, site: Site, name: str, n_pairs: int, chosen: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Two Gaussian vectors and one difference of two random tokens' activations for each pair."""
        stream = generator(self.seed, "direction_norm", name, site)
        shape = torch.empty(n_pairs, self.model.d_model)
        isotropic, second = random_like(shape, stream), random_like(shape, stream)
        two = torch.randint(len(self.tokens[0]), (2, n_pairs), generator=stream).numpy()
        two[1] = np.where(two[0] == two[1], (two[1] + 1) % len(self.tokens[0]), two[1])  # another token
        two = two[:, chosen]
        one, other = (self.at(site, self.tokens[0][i], self.tokens[1][i]).float() for i in two)
        device = one.device
        which = torch.from_numpy(chosen)
        return isotropic[which].to(device), second[which].to(device), one - other


def _column(values: Tensor, repeats: int = 1) -> np.ndarray:
    return values.float().reshape(-1).cpu().numpy().repeat(repeats)


def _edit(name: str, x: Tensor, a: Tensor | None, isotropic: Tensor, second: Tensor, between: Tensor) -> Tensor:
    if a is None:
        if name == "random_direction":
            return swap_direction(x, isotropic)
        kind, factor = name.rsplit("_", 1)
        if kind == "scale":
            return rescale(x, float(factor))
        return rotate_by_distance(x, second, abs(float(factor) - 1) * norm(x))
    if name == "self":
        return swap_direction(x, x)
    if name == "direction":
        return swap_direction(x, a)
    if name == "norm":
        return swap_norm(x, a)
    if name == "full":
        return replace(x, a)
    if name == "placebo_norm":
        return rotate_by_distance(x, second, (norm(a) - norm(x)).abs())
    return matched_placebo(x, swap_direction(x, a), isotropic if name == "placebo_direction" else between)


class _Run:
    """Rows measured so far."""

    def __init__(self, plan: _Plan, batch_rows: int | None, path: str, progress: Callable[[int], object] | None):
        self.plan, self.settings = (
            plan,
            {"metrics": METRICS, "batch_rows": batch_rows, "path": path, "progress": progress},
        )
        self.tables: list[pd.DataFrame] = []
        self.effects: list[tuple[int, Effects]] = []
        self.dropped: dict[str, int] = {}

    def in_place(self, recording: Recording, first: int, site: Site) -> None:
        """The rows whose targets are in this recording, whose first prompt has number `first`."""
        among = first + np.arange(len(recording.length))
        table, vectors, _ = self._gather(site, among)
        if len(table):
            prompt = torch.tensor(table.target_prompt.to_numpy() - first)
            position = torch.tensor(table.target_position.to_numpy())
            self._store(table, "in_place", measure(recording, site, prompt, position, vectors, **self.settings))

    def single_token(self, alone: Recording, site: Site) -> None:
        """Every row, the vector being the only token; the clean side is the target's own vector there."""
        table, vectors, clean = self._gather(site, None)
        if table.empty:
            return
        zero = torch.zeros(len(table), dtype=torch.long)
        index = torch.from_numpy(
            pd.factorize(pd.MultiIndex.from_arrays([table.target_prompt, table.target_position]))[0]
        )
        first = np.unique(index.numpy(), return_index=True)[1]
        reference = Reference(clean[torch.from_numpy(first).to(clean.device)], index)
        self._store(
            table, "single_token", measure(alone, site, zero, zero, vectors, reference=reference, **self.settings)
        )

    def _gather(self, site: Site, among: np.ndarray | None) -> tuple[pd.DataFrame, Tensor, Tensor]:
        names = [name for s, name in self.plan.pairs if s == site]
        tables, vectors, clean = [], [], []
        for name in names:
            table, edited, x = self.plan.rows(site, name, among)
            tables.append(table)
            vectors.append(edited.flatten(0, 1))
            clean.append(x[:, None].expand_as(edited).flatten(0, 1))
        table, edited, x = pd.concat(tables, ignore_index=True), torch.cat(vectors), torch.cat(clean)
        good = edited.isfinite().all(dim=-1).cpu().numpy()
        for edit, n in table.edit[~good].value_counts().items():
            self._drop(f"{edit}: no such vector (a rotation moves x by at most 2‖x‖)", int(n))
        which = torch.from_numpy(np.flatnonzero(good)).to(edited.device)
        return table.loc[good].reset_index(drop=True), edited[which], x[which]

    def _drop(self, reason: str, n: int) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + n

    def _store(self, table: pd.DataFrame, context: str, effects: Effects) -> None:
        table = table.assign(context=context, **{name: effects[name].numpy() for name in METRICS})
        good = np.isfinite(table[["kl", "js", "clean_entropy"]].to_numpy()).all(axis=1)
        if not good.all():
            self._drop("effect not finite", int((~good).sum()))
        self.tables.append(table.loc[good])
        self.effects.append((int(table.layer.iloc[0]) if len(table) else -1, effects))

    def frame(self, layers: list[int], contexts: Sequence[str]) -> pd.DataFrame:
        """All rows in the order layer, context, pair set, pair, edit."""
        if not any(len(table) for table in self.tables):
            raise ResultError(f"no row is left; dropped: {self.dropped}, pairs found: {self.plan.found}")
        frame = pd.concat(self.tables, ignore_index=True)
        order = {
            "layer": layers,
            "context": contexts,
            "pair_set": PAIR_SETS,
            "edit": list(dict.fromkeys(e for edits in EDITS.values() for e in edits)),
        }
        for column, values in order.items():
            frame[column] = pd.Categorical(frame[column], categories=values, ordered=True)
        frame = frame.sort_values(["layer", "context", "pair_set", "pair", "edit"], kind="stable", ignore_index=True)
        frame = frame.astype({name: "int64" if name == "layer" else "str" for name in order})
        small = ("target_prompt", "target_position", "source_prompt", "source_position", "pair", "layer")
        frame = frame.astype({name: "int32" for name in small})
        frame = frame.astype({name: "float32" for name in ("target_norm", "source_norm", "cosine")})
        return frame[[*COLUMNS, *(["norm_read"] if "norm_read" in frame else [])]]

    def paths(self) -> dict[str, Any]:
        """Which path ran at which layer, and how exact it was."""
        by_layer: dict[int, set[str]] = {}
        for layer, effects in self.effects:
            by_layer.setdefault(layer, set()).add(effects.path)
        reasons = sorted({e.why_hooks for _, e in self.effects if e.why_hooks})
        return {
            "path": {layer: "+".join(sorted(paths)) for layer, paths in sorted(by_layer.items())},
            "why_hooks": reasons or None,
            "replay_delta": max((e.delta for _, e in self.effects if np.isfinite(e.delta)), default=None),
            "chunks_halved": sum(e.halvings for _, e in self.effects),
        }
