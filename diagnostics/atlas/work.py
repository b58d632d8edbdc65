"""The work of an atlas: eight prompts of one SAE at a time, every active latent of every token."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch

from diagnostics.atlas.columns import COLUMNS
from diagnostics.atlas.scores import DRAWS, attributions, exact_second_order, token_gradients
from diagnostics.running.clean import CleanActivations, RunSettings
from diagnostics.running.notes import how_measured, noted, summed, what_dropped
from diagnostics.running.recordings import SHARD
from diagnostics.running.units import Tick, Unit, UnitResult, narrowed
from diagnostics.sampling.tokens import TokenFilter, generator, hash_keys
from interventions.edits import matched_placebo
from interventions.effects import Effects, measure
from interventions.models.causal_model import CausalModel
from interventions.shared_directions import Directions
from interventions.texts.prompts import Prompts
from sae_models.active_latents import ActiveLatents, active_latents
from sae_models.dictionaries import Dictionary

METRICS = ("kl", "kl_direct", "top1_drop", "top1_changed", "clean_top1", "top1", "clean_entropy")
PROMPTS = 8
"""in a work unit, and in a shard of the table; a study's shards hold a whole number of them"""
_SOME = 2**14  # entries at once


def merged(done: Sequence[UnitResult], dictionaries: Sequence[Dictionary]) -> dict[str, Any]:
    """Notes of all units as one."""
    how = how_measured((one.unit["sae"], one.notes) for one in done)
    by_sae: dict[str, Any] = {}
    for dictionary in dictionaries:
        own = [one.notes for one in done if one.unit["sae"] == dictionary.name]
        gaps = np.array([value for note in own for value in note["gap"]], dtype=float)
        gaps = gaps[np.isfinite(gaps)]
        by_sae[dictionary.name] = {
            "site": str(dictionary.site),
            "tokens": sum(note["tokens"] for note in own),
            "tokens_left_out": summed(note["left_out"] for note in own),
            **what_dropped(own),
            "path_gap": {"median": float(np.median(np.abs(gaps))), "n": len(gaps)} if len(gaps) else None,
            "second_order": _second_orders([note["second_order"] for note in own if note["second_order"]]),
            "path": how["path"].get(dictionary.name, ""),
        }
    return {"atlas": by_sae, **how, "path": {name: own["path"] for name, own in by_sae.items()}}


def _second_orders(notes: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """How the exact second order of an SAE's entries was formed, and how well its two ways agreed (None: not compared)."""
    agreements = [note["agreement"] for note in notes if note["agreement"] is not None]
    return {
        "methods": sorted({note["method"] for note in notes}),
        "why_central": sorted({note["why_central"] for note in notes} - {None}) or None,
        "agreement": max((one for one in agreements if np.isfinite(one)), default=None),
        "rows": sum(note["rows"] for note in notes),
        "second_orders_not_finite": sum(note["not_finite"] for note in notes),
    } if notes else None  # fmt: skip


class AtlasRunner:
    """Computes units; the clean pass over all prompts is made when the first one is asked for."""

    def __init__(
        self,
        model: CausalModel,
        prompts: Prompts,
        dictionaries: Sequence[Dictionary],
        settings: RunSettings,
        asked: dict[str, Any],
    ):
        self.model, self.prompts, self.dictionaries = model, prompts, {d.name: d for d in dictionaries}
        self.settings, self.asked = settings, asked
        self._known: dict[str, Directions] = {}

    @cached_property
    def clean(self) -> CleanActivations:
        return CleanActivations(self.model, self.prompts, self.settings)

    @cached_property
    def filters(self) -> dict[str, TokenFilter]:
        """Which tokens are usable at each SAE's own site, whatever other SAEs are measured."""
        return {name: self.clean.filter_at(dictionary.site) for name, dictionary in self.dictionaries.items()}

    def directions(self, dictionary: Dictionary) -> Directions:
        """Of an SAE's decoder; with the logits of each, made once."""
        if dictionary.name not in self._known:
            directions = Directions(dictionary.directions.float())
            self._known = {dictionary.name: directions}  # one SAE's at a time: they are large
        return self._known[dictionary.name]

    def units(self) -> list[Unit]:
        """SAE by SAE, whose directions' logits are kept meanwhile; rows: tokens, the cost before anything is encoded."""
        length = np.array([len(tokens) for tokens in self.prompts.tokens])
        return [
            Unit.of(
                rows=int(length[start : start + PROMPTS].sum()),
                group=("", name, start // SHARD),
                sae=name,
                first_prompt=start,
            )
            for name in self.dictionaries
            for start in range(0, len(length), PROMPTS)
        ]

    def prepare(self, stage: str) -> None:
        """Form what all units share."""
        _ = self.filters

    def __call__(self, unit: Unit, tick: Tick) -> tuple[pd.DataFrame, dict[str, Any]]:
        work = _Work(self, self.dictionaries[unit["sae"]], unit["first_prompt"])
        notes: dict[str, Any] = {
            "tokens": len(work.prompt), "left_out": self.filters[unit["sae"]].left_out(work.among), "self_kl": [], "gap": [],
            "not_finite": 0, "placebos_not_finite": 0, "second_order": None,
        }  # fmt: skip
        if not len(work.active):
            return work.table({}), notes
        columns = work.effects(notes) | work.sizes() | work.scores(notes) | work.second_order(notes)
        columns["kl_placebo"] = work.placebos(notes)
        frame = work.table(columns)
        good = np.isfinite(frame[["kl", "kl_direct", "top1_drop"]].to_numpy()).all(axis=1)
        notes["not_finite"] = int((~good).sum())
        return frame.loc[good].reset_index(drop=True), notes


class _Work:
    """Some prompts through one SAE: their usable tokens, `[token]`, and the latents active there, `[entry]`."""

    def __init__(self, runner: AtlasRunner, dictionary: Dictionary, first: int):
        clean, self.dictionary, self.asked, self.settings = runner.clean, dictionary, runner.asked, runner.settings
        assert dictionary.sae is not None
        self.sae, self.clean = dictionary.sae, clean
        self.among = np.arange(first, min(first + PROMPTS, len(clean.length)))
        row, self.position = np.nonzero(runner.filters[dictionary.name].usable[self.among])
        self.prompt = self.among[row]
        self.x = clean.at(dictionary.site, self.prompt, self.position)
        self.active: ActiveLatents = active_latents(self.sae, self.x)
        self.recording = clean.recording(first // SHARD)
        self.own, self.at = torch.from_numpy(self.prompt % SHARD), torch.from_numpy(self.position)
        self.token, self.latent = torch.from_numpy(self.active.token), torch.from_numpy(self.active.latent)
        self.z = torch.from_numpy(self.active.z)
        # Every token is also put back as it was, once, after the entries: the noise floor of this very batching.
        selves = torch.arange(len(self.prompt))
        nothing = torch.zeros_like(selves)
        self.every = torch.cat([self.token, selves])
        coefficient = torch.cat([-self.z, nothing.to(self.z)])
        self.edits = runner.directions(dictionary).times(coefficient, torch.cat([self.latent, nothing]))

    def removed(self, some: torch.Tensor) -> torch.Tensor:
        """z_i·d_i of some entries."""
        return -self.edits.change(some)

    def measured(self, token: torch.Tensor, edits: Any, metrics: Sequence[str]) -> Effects:
        return measure(
            self.recording, self.dictionary.site, self.own[token], self.at[token], edits, metrics=metrics,
            batch_rows=self.settings.batch_rows, path=self.settings.path,
        )  # fmt: skip

    def effects(self, notes: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Of every entry; what putting tokens back did goes to the notes."""
        n = len(self.active)
        found = self.measured(self.every, self.edits, METRICS)
        noted(notes, found)
        notes["self_kl"] = found["kl"][n:].tolist()
        return {name: found[name][:n] for name in METRICS}

    def sizes(self) -> dict[str, torch.Tensor]:
        """Norm, dose and angle of every entry."""
        device = self.x.device
        size = self.sae.W_dec.float().norm(dim=-1)
        inner = []
        for some in torch.arange(len(self.token)).split(_SOME):
            latent = self.latent[some].to(device)
            unit = self.sae.W_dec[latent].float() / size[latent].clamp(min=1e-30)[:, None]
            inner.append((self.x[self.token[some].to(device)].float() * unit).sum(-1))
        norm = self.x.float().norm(dim=-1)[self.token.to(device)]
        dose = self.z.abs().to(device) * size[self.latent.to(device)]
        return {"norm": norm, "delta_norm": dose, "cosine": torch.cat(inner) / norm, "inner": torch.cat(inner)}

    @cached_property
    def on_path(self) -> np.ndarray:
        """Which tokens have integrated gradients and Fisher forms: the same for every SAE and depth."""
        return _drawn(hash_keys(self.asked["seed"], "atlas path", self.prompt, self.position), self.asked["path_share"])

    def scores(self, notes: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Attributions of every entry."""
        p, device = self.asked, self.x.device
        gone = torch.zeros_like(self.x, dtype=torch.float32)
        for some in torch.arange(len(self.token)).split(_SOME):
            gone.index_add_(0, self.token[some].to(device), self.removed(some).to(device))
        found = token_gradients(
            self.recording, self.dictionary.site, self.own, self.at, (self.x.float() - gone).to(self.x),
            self.on_path, steps=p["steps"], samples=p["samples"],
            generator=generator(p["seed"], "atlas", self.dictionary.label, int(self.among[0])),
        )  # fmt: skip
        notes["gap"] = [] if found is None else found.gap.tolist()
        return attributions(found, self.token, self.removed)

    def second_order(self, notes: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Exact second order, and the sampled forms that tend to it, of the entries of tokens with a path; nan elsewhere."""
        columns = {
            name: torch.full((len(self.token),), torch.nan)
            for name in ("second_order", *map("fisher_{}".format, DRAWS))
        }
        some = torch.from_numpy(self.on_path)[self.token].nonzero()[:, 0]
        if not len(some):
            return columns
        tokens = torch.from_numpy(np.flatnonzero(self.on_path))
        found = exact_second_order(
            self.recording, self.dictionary.site, self.own[tokens], self.at[tokens],
            torch.searchsorted(tokens, self.token[some]), lambda which: self.edits.change(some[which]),
            generator=generator(self.asked["seed"], "atlas draws", self.dictionary.label, int(self.among[0])),
            batch_rows=self.settings.batch_rows, path=self.settings.path,
        )  # fmt: skip
        for name, values in columns.items():
            values[some] = found[name].float()
        noted(notes, found)
        notes["second_order"] = {
            "method": found.method, "why_central": found.why_central, "agreement": found.agreement, "rows": len(some),
            "not_finite": found.n_nonfinite,
        }  # fmt: skip
        return columns

    def placebos(self, notes: dict[str, Any]) -> torch.Tensor:
        """KL of a matched placebo, nan where none was asked for, or where it does not exist (counted)."""
        p, kl = self.asked, torch.full((len(self.token),), torch.nan)
        prompt, position = self.prompt[self.active.token], self.position[self.active.token]
        keys = hash_keys(p["seed"], "atlas placebo", prompt, position, self.active.latent)
        some = torch.from_numpy(np.flatnonzero(_drawn(keys, p["placebo_share"])))
        if not len(some):
            return kl
        stream = generator(p["seed"], "atlas placebo", self.dictionary.label, int(self.among[0]))
        towards = self.clean.between(self.dictionary.site, len(some), stream, np.arange(len(some)))
        x = self.x[self.token[some].to(self.x.device)]
        edited = matched_placebo(x, (x.float() - self.removed(some).to(x.device)).to(x), towards.to(x))
        found = self.measured(self.token[some], edited, ("kl",))
        kl[some] = found["kl"].float()
        noted(notes, found)
        notes["placebos_not_finite"] = int((~kl[some].isfinite()).sum())
        return kl

    def table(self, columns: dict[str, torch.Tensor]) -> pd.DataFrame:
        """The unit's lines."""
        n, token = len(self.active), self.active.token
        known = {
            "layer": np.full(n, self.dictionary.site.layer), "point": [self.dictionary.site.point] * n, "sae": [self.dictionary.name] * n,
            "prompt": self.prompt[token], "position": self.position[token], "latent": self.active.latent, "z": self.active.z,
        } | {name: value.cpu().numpy() for name, value in columns.items()}  # fmt: skip
        found = pd.DataFrame({name: known.get(name, np.zeros(n)) for name in COLUMNS})
        return narrowed(found)


def _drawn(keys: np.ndarray, share: float) -> np.ndarray:
    """Keys in the first `share` of their range."""
    return keys <= np.uint64(min(int(share * 2.0**64), 2**64 - 1)) if share else np.zeros(len(keys), dtype=bool)
