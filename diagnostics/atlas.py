"""What does removing each active latent at each token do, exhaustively, and which cheap score could have told?

Every (token, active latent) of a text is ablated once, exactly: KL and direct KL beside activation, size, angle and gradient
attributions. The table is a data set on which others can score methods of their own; `COLUMNS` is its schema.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from typing_extensions import Self

from diagnostics.active_latents import ActiveLatents, active_latents
from diagnostics.atlas_scores import attributions, token_gradients
from diagnostics.atlas_summary import summaries, summary_frame
from diagnostics.probes import Probe, probes_of
from diagnostics.results import Result, model_provenance, save_tokens, write_frame, write_json, write_whole
from diagnostics.sampling import generator, hash_keys
from diagnostics.statistics import noise_floor
from diagnostics.study import Clean, Settings
from diagnostics.units import Tick, Unit, run_units
from interventions.along import Directions
from interventions.edits import matched_placebo
from interventions.effects import measure
from interventions.errors import ResultError
from interventions.models import CausalModel, wrap
from interventions.texts import Prompts, as_prompts

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
METRICS = ("kl", "kl_direct", "top1_drop", "top1_changed", "clean_top1", "top1", "clean_entropy")
_SAME = ("model", "weights_sha256", "dtype", "sink_filter", "path_share", "steps", "samples", "placebo_share", "seed")
PROMPTS = 8
"""in a work unit, and in a shard of the table"""


@dataclass(frozen=True)
class CausalAtlas(Result):
    """Exact effects of removing every active latent at every usable token, beside cheap scores, and how they were made.

    On disk the table is sharded: `atlas/SAE-PART.parquet`, eight prompts each, together one data set; `atlas.json` repeats the schema.
    """

    NAME: ClassVar[str] = "atlas"

    @classmethod
    def files(cls) -> tuple[str, ...]:
        """What every atlas has in its folder."""
        return (f"{cls.NAME}.json", "tokens.npy", cls.NAME)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """An atlas as the command wrote it. Raises `ResultError` when the folder does not hold a whole one."""
        folder = Path(folder)
        if missing := [name for name in cls.files() if not (folder / name).exists()]:
            raise ResultError(f"{folder} holds no {cls.NAME}: {missing[0]} is missing")
        provenance = json.loads((folder / f"{cls.NAME}.json").read_text(encoding="utf-8"))["provenance"]
        shards = sorted((folder / cls.NAME).glob("*.parquet"))
        frame = _whole([pd.read_parquet(shard) for shard in shards], provenance["saes"])
        if len(frame) != provenance["rows"]:
            raise ResultError(
                f"{folder / cls.NAME} holds {len(frame)} rows, its JSON says {provenance['rows']}; write it again"
            )
        tokens = [[int(t) for t in row if t >= 0] for row in np.load(folder / "tokens.npy")]
        return cls(frame, tokens, provenance)

    def write(self, folder: Path) -> list[str]:
        """Shards, tokens, summary with schema and provenance, and figures, into a folder; the names of the files."""
        folder = Path(folder)
        shards = folder / self.NAME
        shutil.rmtree(shards, ignore_errors=True)
        shards.mkdir(parents=True)
        for number, name in enumerate(self.saes):
            own = self.frame.loc[self.frame.sae == name]
            for part, some in own.groupby(own.prompt // PROMPTS, sort=True):
                write_frame(shards / f"{number:02d}-{part:05d}.parquet", some.reset_index(drop=True))
        save_tokens(folder / "tokens.npy", self.tokens)
        write_json(folder / f"{self.NAME}.json", self.as_dict())
        import matplotlib.pyplot as plt

        names = list(self.files())
        for name, figure in self.figures().items():
            for end, how in (("png", {"dpi": 200}), ("svg", {"metadata": {"Date": None}})):
                write_whole(folder / f"{name}.{end}", lambda path, f=figure, how=how: f.savefig(path, **how))
                names.append(f"{name}.{end}")
            plt.close(figure)
        return names

    @classmethod
    def joined(cls, atlases: Sequence["CausalAtlas"]) -> "CausalAtlas":
        """Atlases of several SAEs as one, also where some read fewer of the same prompts.

        Raises `ResultError` where model, text or settings differ, or two SAEs have one name.
        """
        if not atlases:
            raise ResultError("no atlas to join; give at least one")
        tokens = max((atlas.tokens for atlas in atlases), key=len)
        first = atlases[0].provenance
        for atlas in atlases:
            p = atlas.provenance
            if differ := [name for name in _SAME if p[name] != first[name]]:
                raise ResultError(
                    f"{differ[0]} is {first[differ[0]]} in one atlas, {p[differ[0]]} in another; join such as agree"
                )
            if atlas.tokens != tokens[: len(atlas.tokens)]:
                raise ResultError("the atlases are of other prompts; join such as begin with the same ones")
        names = [name for atlas in atlases for name in atlas.saes]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise ResultError(f"two SAEs have the name {twice[0]!r}; join atlases of different ones")
        every = [atlas.provenance for atlas in atlases]
        both: dict[str, Any] = {
            name: {key: value for p in every for key, value in p[name].items()} for name in ("saes", "atlas", "path")
        }
        both |= {name: sum(p[name] for p in every) for name in ("rows",)}
        both |= {
            "sites": list(dict.fromkeys(site for p in every for site in p["sites"])),
            "prompts": len(tokens),
            "why_hooks": sorted({why for p in every for why in p["why_hooks"] or []}) or None,
            "replay_delta": max((p["replay_delta"] for p in every if p["replay_delta"] is not None), default=None),
            "joined": [{key: value for key, value in p.items() if p[key] != first[key]} for p in every],
        }
        return cls(_whole([atlas.frame for atlas in atlases], both["saes"]), tokens, first | both)

    @property
    def saes(self) -> list[str]:
        """Names of the SAEs, in the order in which they were given."""
        return list(self.provenance["saes"])

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Statistics of each SAE."""
        return summaries(self.frame, self.provenance)

    def as_dict(self) -> dict[str, Any]:
        """Summary, schema and provenance, as they stand in the JSON file."""
        return {"summary": self.groups, "columns": COLUMNS, "provenance": self.provenance}

    def summary(self) -> pd.DataFrame:
        """A line for each SAE and score: rank correlation with KL, recall, false negatives, with intervals."""
        return summary_frame(self.groups)

    def table(self) -> str:
        """The summary as text, for a terminal."""
        from diagnostics.atlas_summary import terminal

        return terminal(self.groups, self.provenance)

    def plot(self) -> Any:
        """Predicted against exact effects, and how well each score ranks latents, by depth. Returns a matplotlib Figure."""
        from diagnostics.atlas_plots import plot_atlas

        return plot_atlas(self)

    def figures(self) -> dict[str, Any]:
        """The calibration figure."""
        return {f"{self.NAME}_calibration": self.plot()}

    def _repr_html_(self) -> str:
        return self.summary().to_html(index=False, float_format="%.3g")


@torch.no_grad()
def causal_atlas(
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    saes: Any,
    *,
    sink_filter: float | None = 10.0,
    path_share: float = 0.1,
    steps: int = 6,
    samples: int = 4,
    placebo_share: float = 0.05,
    seed: int = 0,
    batch_rows: int | None = None,
    path: str = "auto",
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> CausalAtlas:
    """Subtract z_i·d_i, the SAE's error kept, for every active latent at every usable token, and measure what the model does.

    saes: an SAE (anything that `as_sae` takes), or several by name, each at the site it belongs to; latents of either sign. Tokens
    that do not serve (position 0, special tokens, sinks: ‖x‖ > sink_filter × the site's median) are left out and counted.
    path_share: share of the tokens, drawn by hash, that also get `integrated` (steps points) and `fisher` (samples next tokens);
    placebo_share: share of the rows that get a matched placebo, along the difference of two other tokens' activations. Where
    replay is not exact, gradients are nan and effects come from full forward passes. Work is cut into units of eight prompts × SAE,
    kept in `folder` as they are done; gradients and effects in float32 at least.

    Raises `BelongingError` for an SAE of another model, width or site, `ResultError` for settings that do not serve.
    """
    model = wrap(model)
    prompts = as_prompts(prompts, model.tokenizer)
    if not 0 <= path_share <= 1 or not 0 <= placebo_share <= 1 or steps < 1 or samples < 1:
        raise ResultError(
            f"path_share {path_share}, placebo_share {placebo_share}, steps {steps}, samples {samples}; expected shares from 0 to "
            "1, and at least one of the others"
        )
    probes = probes_of(saes, model, None)
    if plain := [probe.name for probe in probes if probe.sae is None]:
        raise ResultError(f"{plain[0]!r} are directions; an atlas needs SAEs, which say where latents are active")
    settings = Settings(
        sites=tuple(dict.fromkeys(probe.site for probe in probes)),
        sink_filter=sink_filter, seed=seed, batch_rows=batch_rows, path=path, metrics=METRICS,
    )  # fmt: skip
    settings.check(model)
    identity = {
        **model_provenance(model),
        "text": prompts.provenance,
        "saes": {probe.name: probe.provenance() for probe in probes},
        "sites": [str(site) for site in settings.sites],
        "sink_filter": sink_filter,
        "path_share": path_share,
        "steps": steps,
        "samples": samples,
        "placebo_share": placebo_share,
        "seed": seed,
        "batch_rows": batch_rows,
        "asked_path": path,
    }
    runner = _Runner(model, prompts, probes, settings, identity)
    done = run_units(runner.units(), folder, runner, identity=identity, overwrite=overwrite, progress=progress)
    frame = _whole([unit.frame for unit in done], {probe.name: None for probe in probes})
    notes = _merged([(unit.unit["sae"], unit.notes) for unit in done], probes)
    provenance = identity | {"prompts": len(prompts.tokens), "rows": len(frame), **notes}
    return CausalAtlas(frame, prompts.tokens, provenance)


def _whole(parts: list[pd.DataFrame], saes: Any) -> pd.DataFrame:
    """One table, names as categories."""
    frame = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
    frame["sae"] = pd.Categorical(frame.sae, categories=list(saes))
    frame["point"] = pd.Categorical(frame.point)
    return frame


def _merged(notes: list[tuple[str, dict[str, Any]]], probes: list[Probe]) -> dict[str, Any]:
    """Notes of all units as one."""
    by_sae: dict[str, Any] = {}
    for probe in probes:
        own = [n for name, n in notes if name == probe.name]
        left_out: dict[str, int] = {}
        for note in own:
            for reason, n in note["left_out"].items():
                left_out[reason] = left_out.get(reason, 0) + n
        self_kl = np.array([value for note in own for value in note["self_kl"]])
        gaps = np.array([value for note in own for value in note["gap"]])
        by_sae[probe.name] = {
            "site": str(probe.site),
            "tokens": sum(note["tokens"] for note in own),
            "tokens_left_out": {reason: n for reason, n in left_out.items() if n},
            "noise_floor": noise_floor(self_kl) if len(self_kl) else None,
            "rows_not_finite": sum(note["not_finite"] for note in own),
            "path_gap": {"median": float(np.median(np.abs(gaps))), "n": len(gaps)} if len(gaps) else None,
        }
    deltas = [note["delta"] for _, note in notes if note["delta"] is not None]
    return {
        "atlas": by_sae,
        "path": {str(p.site): "+".join(sorted({n["path"] for name, n in notes if name == p.name})) for p in probes},
        "why_hooks": sorted({n["why_hooks"] for _, n in notes if n["why_hooks"]}) or None,
        "replay_delta": max(deltas, default=None),
    }


def _counted(reasons: dict[str, np.ndarray]) -> dict[str, int]:
    """Tokens left out, each under the first reason that holds; padding is no token."""
    left, found = ~reasons["padding"], {}
    for reason, bad in reasons.items():
        found[reason] = int((left & bad).sum())
        left = left & ~bad
    return {reason: n for reason, n in found.items() if n}


class _Runner:
    """Computes units; the clean pass over all prompts is made when the first one is asked for."""

    def __init__(
        self, model: CausalModel, prompts: Prompts, probes: list[Probe], settings: Settings, asked: dict[str, Any]
    ):
        self.model, self.prompts, self.probes = model, prompts, {probe.name: probe for probe in probes}
        self.settings, self.asked = settings, asked
        self._known: dict[str, Directions] = {}

    @cached_property
    def clean(self) -> Clean:
        return Clean(self.model, self.prompts, self.settings)

    def _directions(self, probe: Probe) -> Directions:
        """Of an SAE's decoder; with the logits of each, made once."""
        if probe.name not in self._known:
            self._known = {probe.name: Directions(probe.directions.float())}  # one SAE's at a time: they are large
        return self._known[probe.name]

    def units(self) -> list[Unit]:
        """SAE by SAE, whose directions' logits are kept meanwhile; rows: tokens, the cost before anything is encoded."""
        length = np.array([len(tokens) for tokens in self.prompts.tokens])
        return [
            Unit.of(rows=int(length[start : start + PROMPTS].sum()), sae=name, first_prompt=start)
            for name in self.probes
            for start in range(0, len(length), PROMPTS)
        ]

    def __call__(self, unit: Unit, tick: Tick) -> tuple[pd.DataFrame, dict[str, Any]]:
        probe, first = self.probes[unit["sae"]], unit["first_prompt"]
        clean, sae, site = self.clean, probe.sae, probe.site
        assert sae is not None
        among = np.arange(first, min(first + PROMPTS, len(clean.length)))
        prompt, position = np.nonzero(clean.usable[among])
        left_out = {
            reason: int(bad[among].sum()) for reason, bad in clean.filter.reasons.items() if reason != "padding"
        }
        notes: dict[str, Any] = {
            "tokens": len(prompt), "left_out": left_out, "self_kl": [], "gap": [], "not_finite": 0,
            "path": "none", "why_hooks": None, "delta": None,
        }  # fmt: skip
        x = clean.at(site, among[prompt], position)
        active = active_latents(sae, x)
        if not len(active):
            return self._table(probe, prompt, position, active, {}), notes
        shard, begins = divmod(first, 64)
        assert clean.shard(shard)[0] == first - begins
        recording = clean.recording(shard)
        own, at = torch.from_numpy(prompt + begins), torch.from_numpy(position)
        token, latent = torch.from_numpy(active.token), torch.from_numpy(active.latent)
        z = torch.from_numpy(active.z)
        # The token itself, put back, once a token: the noise floor of this very batching.
        n, selves = len(active), torch.arange(len(prompt))
        every = torch.cat([token, selves])
        none = torch.zeros(len(selves), dtype=torch.long)
        edits = self._directions(probe).times(torch.cat([-z, none.to(z)]), torch.cat([latent, none]))

        def removed(some: torch.Tensor) -> torch.Tensor:
            return -edits.change(some)

        effects = measure(
            recording, site, own[every], at[every], edits, metrics=METRICS, batch_rows=self.settings.batch_rows,
            path=self.settings.path,
        )  # fmt: skip
        columns = {name: effects[name][:n] for name in METRICS}
        notes["self_kl"] = effects["kl"][n:].tolist()
        notes |= {"path": effects.path, "why_hooks": effects.why_hooks, "delta": effects.delta}
        columns |= self._scores(probe, recording, own, at, x, active, removed, among[prompt], notes)
        columns["kl_placebo"] = self._placebos(
            probe, recording, own, at, x, token, removed, among[prompt], position, latent
        )
        frame = self._table(probe, among[prompt], position, active, columns)
        good = np.isfinite(frame[["kl", "kl_direct", "top1_drop"]].to_numpy()).all(axis=1)
        notes["not_finite"] = int((~good).sum())
        return frame.loc[good].reset_index(drop=True), notes

    def _scores(
        self, probe: Probe, recording: Any, own: Any, at: Any, x: Any, active: ActiveLatents, removed: Any,
        prompt: np.ndarray, notes: dict[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        """Size, angle and gradients of each entry."""
        sae, p = probe.sae, self.asked
        assert sae is not None
        device = x.device
        token = torch.from_numpy(active.token)
        latent = torch.from_numpy(active.latent).to(device)
        z = torch.from_numpy(active.z).to(device)
        size = sae.W_dec.float().norm(dim=-1)
        unit = sae.W_dec.float() / size.clamp(min=1e-30)[:, None]
        inner = torch.cat(
            [
                (x[t.to(device)].float() * unit[i]).sum(-1)
                for t, i in zip(token.split(2**14), latent.split(2**14), strict=True)
            ]
        )
        norm = x.float().norm(dim=-1)[token.to(device)]
        gone = torch.zeros_like(x, dtype=torch.float32)
        for some in torch.arange(len(token)).split(2**14):
            gone.index_add_(0, token[some].to(device), removed(some).to(device))
        key = hash_keys(p["seed"], f"atlas path {probe.label}", prompt, at.numpy())
        on_path = key < np.uint64(min(int(p["path_share"] * 2.0**64), 2**64 - 1))
        found = token_gradients(
            recording, probe.site, own, at, (x.float() - gone).to(x), on_path, steps=p["steps"], samples=p["samples"],
            generator=generator(p["seed"], "atlas", probe.label, int(prompt[0])),
        )  # fmt: skip
        notes["gap"] = [] if found is None else found.gap.tolist()
        sizes = {"norm": norm, "delta_norm": z.abs() * size[latent], "cosine": inner / norm, "inner": inner}
        return sizes | attributions(found, token, removed)

    def _placebos(
        self, probe: Probe, recording: Any, own: Any, at: Any, x: Any, token: Any, removed: Any,
        prompt: np.ndarray, position: np.ndarray, latent: Any,
    ) -> torch.Tensor:  # fmt: skip
        """KL of matched placebos, nan where none was asked for."""
        p = self.asked
        kl = torch.full((len(token),), torch.nan)
        key = hash_keys(p["seed"], f"atlas placebo {probe.label}", prompt[token], position[token], latent.numpy())
        some = torch.from_numpy(np.flatnonzero(key < np.uint64(min(int(p["placebo_share"] * 2.0**64), 2**64 - 1))))
        if not len(some):
            return kl
        stream = generator(p["seed"], "atlas placebo", probe.label, int(prompt[0]))
        towards = self.clean.between(probe.site, len(some), stream, np.arange(len(some)))
        clean = x[token[some].to(x.device)]
        edited = matched_placebo(clean, (clean.float() - removed(some).to(clean.device)).to(clean), towards.to(clean))
        found = measure(
            recording, probe.site, own[token[some]], at[token[some]], edited, batch_rows=self.settings.batch_rows,
            path=self.settings.path,
        )  # fmt: skip
        kl[some] = found["kl"].float()
        return kl

    def _table(
        self, probe: Probe, prompt: np.ndarray, position: np.ndarray, active: ActiveLatents, columns: dict[str, Any]
    ) -> pd.DataFrame:
        n = len(active)
        known = {
            "layer": np.full(n, probe.site.layer), "point": [probe.site.point] * n, "sae": [probe.name] * n,
            "prompt": prompt[active.token], "position": position[active.token], "latent": active.latent, "z": active.z,
        } | {name: value.cpu().numpy() for name, value in columns.items()}  # fmt: skip
        found = pd.DataFrame({name: known.get(name, np.zeros(n)) for name in COLUMNS})
        kinds = {name: "float32" for name in COLUMNS if found[name].dtype.kind == "f"}
        kinds |= {name: "int32" for name in COLUMNS if found[name].dtype.kind in "iu"}
        return found.astype(kinds | {"point": "str", "sae": "str"})
