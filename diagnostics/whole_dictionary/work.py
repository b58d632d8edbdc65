"""The work of a whole dictionary: the rows drawn in 64 prompts of one SAE at a time, each latent removed, beside its placebo."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from diagnostics.running.clean import RunSettings
from diagnostics.running.notes import how_measured, noted, what_dropped
from diagnostics.running.recordings import Recordings, shards
from diagnostics.running.units import Tick, Unit, UnitResult, narrowed
from diagnostics.sampling.tokens import hash_keys
from diagnostics.whole_dictionary.columns import ROWS
from diagnostics.whole_dictionary.scan import Scan
from interventions.edits import matched_placebo, norm_read
from interventions.effects import measure
from interventions.models.causal_model import CausalModel
from interventions.shared_directions import Directions
from interventions.sites import Site
from interventions.texts.prompts import Prompts
from sae_models.dictionaries import Dictionary

METRICS = ("kl", "kl_direct", "top1_changed", "clean_top1", "top1", "clean_entropy")


class EffectsRunner:
    """Computes units. Prompts without a drawn row are left out of the recordings."""

    def __init__(
        self,
        model: CausalModel,
        prompts: Prompts,
        dictionaries: Sequence[Dictionary],
        scans: Mapping[str, Scan],
        settings: RunSettings,
    ):
        self.model, self.dictionaries = model, {d.name: d for d in dictionaries}
        self.scans, self.settings = scans, settings
        self.prompts = np.unique(np.concatenate([scan.prompt for scan in scans.values()]))
        tokens = [prompts.tokens[i] for i in self.prompts]
        self.shards = [self.prompts[some] for some in shards(len(self.prompts))]
        self.recordings = Recordings(model, tokens, settings.sites, settings.cache_bytes)
        self._directions: dict[str, Directions] = {}

    def directions(self, name: str) -> Directions:
        """Of an SAE's decoder; with the logits of each, made once."""
        if name not in self._directions:
            self._directions[name] = Directions(self.dictionaries[name].directions.float())
        return self._directions[name]

    def units(self) -> list[Unit]:
        """Shard by shard, so that a recording serves every SAE; rows: edits, placebos included."""
        found = []
        for number, among in enumerate(self.shards):
            for name, scan in self.scans.items():
                n = _within(scan.prompt, among)
                if rows := n.stop - n.start:
                    found.append(Unit.of(rows=2 * rows, group=("", number), sae=name, shard=number))
        return found

    def __call__(self, unit: Unit, tick: Tick) -> tuple[pd.DataFrame, dict[str, Any]]:
        return _Work(self, unit["sae"], unit["shard"]).measured(tick)


def _within(prompt: Int[ndarray, "row"], among: Int[ndarray, "prompt"]) -> slice:
    """The rows, in the order of their prompts, from the first to the last of some consecutive prompts."""
    return slice(*np.searchsorted(prompt, (among[0], among[-1] + 1)).tolist())


class _Work:
    """The rows of one SAE in one shard of prompts."""

    def __init__(self, runner: EffectsRunner, name: str, shard: int):
        self.dictionary, self.settings = runner.dictionaries[name], runner.settings
        self.scan, self.among = runner.scans[name], runner.shards[shard]
        self.rows, self.last = _within(self.scan.prompt, self.among), Site(runner.model.n_layers - 1)
        self.recording, self.model = runner.recordings[shard], runner.model
        self.directions = runner.directions(name)
        cut = {part: getattr(self.scan, part)[self.rows] for part in ("prompt", "position", "latent", "z")}
        self.prompt, self.position, self.latent_id = (cut[part] for part in ("prompt", "position", "latent"))
        self.own = torch.from_numpy(np.searchsorted(self.among, self.prompt))
        self.at = torch.from_numpy(self.position.astype(np.int64))
        self.latent = torch.from_numpy(self.latent_id.astype(np.int64))
        self.z = torch.from_numpy(cut["z"])

    @cached_property
    def towards(self) -> tuple[Tensor, Tensor]:
        """Two usable tokens of the shard for each row, as (prompt in the recording, position), by a hash of the row: `[two, row]`."""
        prompt, position = np.nonzero(self.scan.usable[self.among])
        n = len(prompt)
        key = [
            hash_keys(self.settings.seed, f"placebo {which}", self.prompt, self.position, self.latent_id)
            for which in (0, 1)
        ]
        one = (key[0] % np.uint64(n)).astype(np.int64)
        other = (one + 1 + (key[1] % np.uint64(max(1, n - 1))).astype(np.int64)) % n
        two = np.stack([one, other])
        return torch.from_numpy(prompt[two]), torch.from_numpy(position[two])

    def placebos(self, which: Int[Tensor, "some"]) -> Float[Tensor, "some d_model"]:
        """Matched placebos of some rows, along the difference of two tokens' activations; nan where that is 0."""
        prompt, position = (part[:, which] for part in self.towards)
        one, other = (self.recording.at(self.dictionary.site, *at).float() for at in zip(prompt, position, strict=True))
        x = self.recording.at(self.dictionary.site, self.own[which], self.at[which])
        change = self.directions.times(-self.z, self.latent).change(which).to(x.device)
        return matched_placebo(x, (x.float() + change).to(x.dtype), (one - other).to(x.dtype))

    def measured(self, tick: Tick) -> tuple[pd.DataFrame, dict[str, Any]]:
        """The unit's table, and its notes. Each prompt's first row is also measured with nothing removed: the noise floor."""
        n, site = len(self.z), self.dictionary.site
        first = torch.from_numpy(np.unique(self.prompt, return_index=True)[1])
        row = torch.cat([torch.arange(n), first])
        removed = self.directions.times(torch.cat([-self.z, torch.zeros(len(first))]), self.latent[row])
        how: dict[str, Any] = {
            "batch_rows": self.settings.batch_rows,
            "path": self.settings.path,
            "progress": tick,
            "nonfinite": "count",
        }
        found = measure(self.recording, site, self.own[row], self.at[row], removed, metrics=METRICS, **how)
        beside = measure(self.recording, site, self.own, self.at, self.placebos, metrics=("kl",), **how)
        notes: dict[str, Any] = {"self_kl": found["kl"][n:].tolist()}
        noted(notes, found)
        noted(notes, beside)
        final = norm_read(self.model.norm_kind, self.recording.at(self.last, self.own, self.at))[:, 0].float().cpu()
        size = self.directions.matrix.norm(dim=-1).cpu()
        scan, rows = self.scan, self.rows
        firings, drawn = scan.firings[self.latent_id], np.bincount(scan.latent, minlength=len(scan.firings))
        known = {
            "layer": np.full(n, site.layer), "point": [site.point] * n, "sae": [self.dictionary.name] * n,
            "prompt": self.prompt, "position": self.position, "latent": self.latent_id, "quartile": scan.quartile[rows],
            "weight": firings / drawn[self.latent_id], "z": scan.z[rows], "norm": scan.norm[rows],
            "delta_norm": (self.z.abs() * size[self.latent]).numpy(), "final_norm": final.numpy(),
            "kl_placebo": beside["kl"].float().numpy(), **{name: found[name][:n].numpy() for name in METRICS},
        }  # fmt: skip
        frame = narrowed(pd.DataFrame({name: known[name] for name in ROWS}))
        good = np.isfinite(frame[["kl", "kl_direct"]].to_numpy()).all(axis=1)
        notes |= {
            "not_finite": int((~good).sum()),
            "placebos_not_finite": int((good & ~np.isfinite(frame.kl_placebo.to_numpy())).sum()),
        }
        return frame.loc[good].reset_index(drop=True), notes


def merged(done: Sequence[UnitResult], dictionaries: Sequence[Dictionary], scans: Mapping[str, Scan]) -> dict[str, Any]:
    """Notes of all units, and of the scan, as one."""
    how = how_measured((one.unit["sae"], one.notes) for one in done)
    by_sae: dict[str, Any] = {}
    for d in dictionaries:
        own, scan = [one.notes for one in done if one.unit["sae"] == d.name], scans[d.name]
        by_sae[d.name] = {
            "site": str(d.site),
            "tokens": int(scan.usable.sum()),
            "tokens_left_out": scan.left_out,
            **what_dropped(own),
        }
    return {"dictionary": by_sae, **how}
