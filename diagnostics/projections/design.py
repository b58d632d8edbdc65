"""The rows of `projections`: latents and tokens drawn once, edits and placebos, and every score beside them."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diagnostics.running.clean import CleanActivations
from diagnostics.running.single_edits import EditedRows, among_prompts, column, dose_columns
from diagnostics.sampling.latents import Drawn, draw_active, draw_latents, draw_tokens, frequency_bins, from_strata
from diagnostics.sampling.tokens import generator, hash_keys
from diagnostics.statistics.tables import PLACEBOS
from interventions.edits import (
    add_direction,
    cosine,
    matched_placebo,
    norm,
    norm_read,
    random_like,
    remove_projection,
    rescale,
    rotate_by_angle,
)
from interventions.errors import ResultError
from interventions.sites import Site
from sae_models.dictionaries import Dictionary

REFERENCES = ("zero", "mean", "latent", "cosine")
"""What an ablation removes: <x, d̂>; <x − μ, d̂>, μ the mean of the usable tokens; z_i·d_i; cos(x, d̂)·C, C the site's median ‖x‖, so
that the perturbation does not grow with ‖x‖ (the cosine ablation of arXiv:2606.15054)."""
ROTATE = "rotate"
EDITS = (
    *REFERENCES,
    *PLACEBOS,
    ROTATE,
    *(f"{ROTATE}_{placebo}" for placebo in PLACEBOS),
    "half",
    "scaled",
    *(f"{step}_{placebo}" for step in ("zero", "half", "scaled") for placebo in PLACEBOS),
    "self",
)
"""`half`, `scaled` and their placebos take part in the rescaled experiment. `zero_placebo_…` is there where `placebo_…` is the placebo of
another reference."""
PARTS = ("all", "rescaled")
"""Which edits the pairs in `detail` get: all, or those of the rescaled experiment alone."""
SCALES = (0.9, 1.1)
_PAIRS = 4096  # edited at once: placebos hold float64 copies
_SELF = 16


@dataclass(frozen=True)
class ProjectionPlan:
    """What a run asks for: see `projection_effects`."""

    n_latents: int
    latents: tuple[int, ...] | None
    tokens: int
    sampling: str
    reference: str
    detail: float
    angle: float
    single_token_share: float
    edits: str = "all"

    def provenance(self) -> dict[str, Any]:
        """As it stands beside a result."""
        return {"tokens_per_latent" if k == "tokens" else k: v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class DrawnLatents:
    """The latents of one SAE."""

    drawn: Drawn
    alone: Drawn
    """of the drawn (indices into them) those that also go into the one-token context"""
    frequency: np.ndarray
    """`[latent of the SAE]`, nan for directions"""
    said: dict[str, Any]


@dataclass(frozen=True)
class _Pairs:
    """(latent, token) pairs of one SAE; all `[pair]`."""

    place: np.ndarray
    """which of the drawn latents"""
    prompt: np.ndarray
    position: np.ndarray
    weight: np.ndarray
    detail: np.ndarray
    again: np.ndarray
    """whether the token is also put back as it was"""

    def __len__(self) -> int:
        return len(self.place)


class ProjectionDesign:
    """The design for one model: the same rows in whatever order they are asked for."""

    def __init__(
        self,
        clean: CleanActivations,
        dictionaries: list[Dictionary],
        plan: ProjectionPlan,
        latents: dict[str, DrawnLatents] | None = None,
    ):
        self.clean, self.dictionaries, self.plan, self.seed = clean, dictionaries, plan, clean.settings.seed
        prompt, position = clean.tokens
        if not len(prompt):
            raise ResultError("no usable token; give other text or a looser sink filter")
        self.others = latents is not None  # drawn of another model, whose frequencies are not these
        self.latents: dict[str, DrawnLatents] = {}
        self.pairs: dict[str, _Pairs] = {}
        self.mean: dict[Site, Tensor] = {}
        self.median: dict[Site, float] = {}
        self.edges: dict[Site, np.ndarray] = {}
        self.found: dict[str, Any] = {
            "pairs_dropped": {},
            "usable_tokens": len(prompt),
            "tokens_left_out": clean.filter.left_out(),
            "saes": {},
        }
        for dictionary in dictionaries:
            x = clean.at(dictionary.site, prompt, position)
            size = norm(x).squeeze(-1).cpu().numpy()
            if dictionary.site not in self.mean:
                self.mean[dictionary.site] = x.double().mean(dim=0)
                self.median[dictionary.site] = float(np.median(size))
                self.edges[dictionary.site] = np.quantile(size, (0.25, 0.5, 0.75))
            frequency, fve = _read(dictionary, x)
            known = None if latents is None else latents[dictionary.name]
            self.latents[dictionary.name] = known or self._draw(dictionary, frequency, len(prompt))
            self.pairs[dictionary.name] = self._tokens(dictionary, x, size)
            said = self.latents[dictionary.name].said | {"fve_here": fve, "pairs": len(self.pairs[dictionary.name])}
            said |= {
                "latents_reached": self._latents_reached(dictionary),
                "tokens_reached": self._tokens_reached(dictionary),
            }
            self.found["saes"][dictionary.name] = said

    def _draw(self, dictionary: Dictionary, fires: np.ndarray | None, n_tokens: int) -> DrawnLatents:
        plan, name = self.plan, dictionary.name
        frequency = np.full(len(dictionary), np.nan) if fires is None else fires
        if fires is None and plan.sampling == "active":
            raise ResultError(f"directions {name!r} are never active; use sampling='stratified'")
        if plan.latents is not None:
            ids = np.array(sorted(set(plan.latents)))
            if ids[0] < 0 or ids[-1] >= len(dictionary):
                raise ResultError(f"{name} has latents 0 to {len(dictionary) - 1}; asked for {ids[0]} to {ids[-1]}")
            drawn, said = Drawn(ids, np.ones(len(ids))), {"latents": len(dictionary), "drawn": len(ids)}
        elif fires is None:
            key = hash_keys(self.seed, f"latents/{dictionary.label}", np.arange(len(dictionary)))
            drawn = from_strata(np.zeros(len(dictionary), dtype=int), key, plan.n_latents)
            said = {"latents": len(dictionary), "drawn": len(drawn.index)}
        else:
            drawn, said = draw_latents(frequency, n_tokens, plan.n_latents, plan.sampling, self.seed, dictionary.label)
        bins = np.zeros(len(drawn.index), dtype=int)
        if fires is not None and plan.sampling == "stratified":
            bins = np.maximum(frequency_bins(frequency)[0][drawn.index], 0)
        few = max(1, round(plan.single_token_share * len(drawn.index)))
        alone = from_strata(bins, hash_keys(self.seed, f"alone/{dictionary.label}", drawn.index), few)
        return DrawnLatents(drawn, alone, frequency, said)

    def _latents_reached(self, dictionary: Dictionary) -> float:
        """The share of the latents that could be drawn that the drawn ones stand for: below 1 where strata got none."""
        latents = self.latents[dictionary.name]
        able = latents.said["latents"] - latents.said.get("never fire", 0)
        return float(latents.drawn.weight.sum() / able) if self.plan.latents is None else 1.0

    def _tokens_reached(self, dictionary: Dictionary) -> float:
        """The same of tokens, of the latent of which it is least."""
        pairs = self.pairs[dictionary.name]
        if self.plan.sampling == "active" or not len(pairs):
            return 1.0
        return float(np.bincount(pairs.place, pairs.weight).min() / len(self.clean.tokens[0]))

    def _tokens(self, dictionary: Dictionary, x: Tensor, size: np.ndarray) -> _Pairs:
        """The tokens of each latent, drawn from all usable ones."""
        prompt, position = self.clean.tokens
        latents, plan = self.latents[dictionary.name], self.plan
        quartile = np.searchsorted(self.edges[dictionary.site], size, side="right")
        chosen = torch.from_numpy(latents.drawn.index).to(x.device)
        unit = dictionary.directions[chosen].float()
        active = _active(dictionary, x, chosen) if plan.sampling == "active" else None
        cosines = (x.float() @ (unit / norm(unit)).T / norm(x)).cpu().numpy()
        parts = []
        for place, latent in enumerate(latents.drawn.index):
            key = hash_keys(self.seed, f"tokens/{dictionary.label}/{latent}", prompt, position)
            if active is not None:
                some = draw_active(active[:, place], key, plan.tokens)
            else:
                some = draw_tokens(quartile, cosines[:, place], key, plan.tokens)
            at = (prompt[some.index], position[some.index])
            part = hash_keys(self.seed, f"detail/{dictionary.label}/{latent}", *at) >> np.uint64(11)
            share = part.astype(float) / 2.0**53
            again = hash_keys(self.seed, f"self/{dictionary.label}/{latent}", *at) % np.uint64(_SELF) == 0
            parts.append((np.full(len(some.index), place), *at, some.weight, share < plan.detail, again))
        return _Pairs(*(np.concatenate(values) for values in zip(*parts, strict=True)))

    def _chosen(self, dictionary: Dictionary, among: np.ndarray | None) -> np.ndarray:
        pairs = self.pairs[dictionary.name]
        if among is None:
            return np.flatnonzero(np.isin(pairs.place, self.latents[dictionary.name].alone.index))
        return among_prompts(pairs.prompt, among)

    def count(self, site: Site, among: np.ndarray | None, null: bool = False) -> int:
        """How many `rows` there are at most: some latents turn out not to fire."""
        zero = self.plan.reference == "zero"
        n, detail = 0, (9 if zero else 12) + (self.plan.edits == "all") * (6 if zero else 5)
        for dictionary in self._at(site):
            chosen, pairs = self._chosen(dictionary, among), self.pairs[dictionary.name]
            n += len(chosen) * 3 + int(pairs.again[chosen].sum())
            n += 0 if among is None else detail * int(pairs.detail[chosen].sum())
        return n

    def _at(self, site: Site) -> list[Dictionary]:
        return [dictionary for dictionary in self.dictionaries if dictionary.site == site]

    def rows(self, site: Site, among: np.ndarray | None) -> EditedRows:
        """The rows at a site whose tokens are in the prompts `among` (None: those for the one-token context), SAE by SAE."""
        parts, against = [], []
        for dictionary in self._at(site):
            chosen = self._chosen(dictionary, among)
            noise = self._tangents(dictionary, chosen)
            for start in range(0, len(chosen), _PAIRS):
                some = slice(start, start + _PAIRS)
                lines = _PairRows(self, dictionary, chosen[some], [t[some] for t in noise], alone=among is None)
                parts.append(lines.rows())
                if among is not None and lines.detail.any():
                    against.append(lines.scaled())
        if not parts:
            return self._none(site)
        found = _joined(parts)
        return EditedRows(found.table, found.vectors, found.clean, against=_joined(against) if against else None)

    def _none(self, site: Site) -> EditedRows:
        empty = self.clean.at(site, np.zeros(0, dtype=int), np.zeros(0, dtype=int))
        dictionary = self._at(site)[0]
        return _PairRows(self, dictionary, np.zeros(0, dtype=int), [empty, empty], alone=True).rows()

    def _tangents(self, dictionary: Dictionary, chosen: np.ndarray) -> list[Tensor]:
        """Where the placebos of each pair turn, for `PLACEBOS`."""
        n, d = len(self.pairs[dictionary.name]), self.clean.model.d_model
        stream = generator(self.seed, "projections", dictionary.site, dictionary.label)
        isotropic = random_like(torch.empty(n, d), stream)[torch.from_numpy(chosen)].to(self.clean.model.device)
        return [self.clean.between(dictionary.site, n, stream, chosen), isotropic]


def _joined(parts: list[EditedRows]) -> EditedRows:
    tables, vectors, clean = zip(*((p.table, p.vectors, p.clean) for p in parts), strict=True)
    return EditedRows(pd.concat(tables, ignore_index=True), torch.cat(vectors), torch.cat(clean))


def _read(dictionary: Dictionary, x: Tensor) -> tuple[np.ndarray | None, float | None]:
    """The share of tokens on which each latent fires, and the fraction of variance that the SAE explains here."""
    if dictionary.sae is None:
        return None, None
    fires, left = torch.zeros(len(dictionary), dtype=torch.long, device=x.device), torch.zeros((), dtype=torch.float64)
    for part in x.split(dictionary.few):
        z = dictionary.sae.encode(part)
        fires += (z != 0).sum(dim=0)
        left = (
            left.to(x.device)
            + (part - (z @ dictionary.sae.W_dec + dictionary.sae.offset(part))).double().square().sum()
        )
    total = (x.double() - x.double().mean(dim=0)).square().sum()
    return (fires.double() / len(x)).cpu().numpy(), float(1 - left / total)


def _active(dictionary: Dictionary, x: Tensor, latents: Tensor) -> np.ndarray:
    """Where each of some latents fires, `[token, latent]`."""
    assert dictionary.sae is not None
    return torch.cat([dictionary.sae.encode(part)[:, latents] != 0 for part in x.split(dictionary.few)]).cpu().numpy()


class _PairRows:
    """Some pairs of one SAE, with what stands there and every score of it."""

    def __init__(
        self, design: ProjectionDesign, dictionary: Dictionary, chosen: np.ndarray, noise: list[Tensor], alone: bool
    ):
        self.design, self.dictionary, self.alone, self.plan = design, dictionary, alone, design.plan
        pairs, latents = design.pairs[dictionary.name], design.latents[dictionary.name]
        self.noise = dict(zip(PLACEBOS, noise, strict=True))
        self.prompt, self.position = pairs.prompt[chosen], pairs.position[chosen]
        self.detail, self.again = pairs.detail[chosen], pairs.again[chosen]
        self.x = design.clean.at(dictionary.site, self.prompt, self.position)
        latent = latents.drawn.index[pairs.place[chosen]]
        self.latent = torch.from_numpy(latent).to(self.x.device)
        self.direction = dictionary.directions[self.latent].to(self.x.device)
        weight = latents.drawn.weight[pairs.place[chosen]]
        if alone:
            within = np.ones(len(latents.drawn.index))
            within[latents.alone.index] = latents.alone.weight
            weight = weight * within[pairs.place[chosen]]
        known = np.full(len(latent), np.nan) if design.others else latents.frequency[latent]
        self.table, self.z = self._scores(latent, known, weight, pairs.weight[chosen])

    def _scores(
        self, latent: np.ndarray, frequency: np.ndarray, latent_weight: np.ndarray, token_weight: np.ndarray
    ) -> tuple[pd.DataFrame, Tensor]:
        x, d, dictionary, site = self.x.float(), self.direction.float(), self.dictionary, self.dictionary.site
        unknown = x.new_full((len(x),), torch.nan)
        mean = self.design.mean[site].to(x)
        z, x_c = unknown, x - mean
        if dictionary.sae is not None:
            z, x_c = (value.to(x) for value in dictionary.activation(self.x, self.latent))
        unit = d / norm(d)
        size = norm(x).squeeze(-1)
        columns: dict[str, Tensor] = {"norm": size, "norm_centred": norm(x_c).squeeze(-1)}
        columns["norm_read"] = norm_read(self.design.clean.model.norm_kind, x).squeeze(-1)
        rows = None if dictionary.rows is None else dictionary.rows[self.latent].to(x)
        for end, direction in (("", unit), ("_encoder", rows)):
            for middle, vector in (("", x), ("_centred", x_c)):
                known = direction is not None
                columns[f"cosine{end}{middle}"] = cosine(vector, direction) if known else unknown
                columns[f"inner{end}{middle}"] = (vector * direction).sum(-1) if known else unknown
        columns |= {
            "activation": z,
            "dose_zero": columns["inner"].abs(),
            "dose_mean": ((x - mean) * unit).sum(-1).abs(),
        }
        columns["dose_latent"] = z.abs() * norm(d).squeeze(-1)
        learned = dictionary.learned
        table = {
            "sae": np.full(len(x), dictionary.name),
            "latent": latent,
            "target_prompt": self.prompt,
            "target_position": self.position,
            "frequency": frequency,
            "latent_weight": latent_weight,
            "token_weight": token_weight,
            "learned_a": np.full(len(x), np.nan) if learned is None else learned.numpy()[latent],
            "norm_quartile": np.searchsorted(self.design.edges[site], columns["norm"].cpu().numpy(), side="right"),
        }
        return pd.DataFrame(table | {name: column(value) for name, value in columns.items()}), z

    def ablated(self, reference: str, x: Tensor | None = None, share: float = 1.0) -> Tensor:
        """What an ablation leaves of the activations (or of `x` in their place)."""
        x = self.x if x is None else x
        if reference == "latent":
            return add_direction(x, self.direction, -self.z)
        if reference == "cosine":
            amount = cosine(x, self.direction) * self.design.median[self.dictionary.site]
            return add_direction(x, self.direction / norm(self.direction), -amount)
        mean = self.design.mean[self.dictionary.site].to(x.device, torch.float32) if reference == "mean" else 0.0
        return remove_projection(x, self.direction, share, mean)

    def rows(self) -> EditedRows:
        """EditedRows that are compared with the prompt as it stands."""
        everywhere, reference = np.ones(len(self.x), dtype=bool), self.plan.reference
        main = self.ablated(reference)
        edits = {reference: (everywhere, main)}
        edits |= {name: (everywhere, vectors) for name, vectors in self.placebos(self.x, main).items()}
        if not self.alone:
            steps = {"half": self.ablated("zero", share=0.5)}
            steps |= {} if reference == "zero" else {"zero": self.ablated("zero")}
            for step, vectors in steps.items():
                beside = self.placebos(self.x, vectors)
                edits |= {step: (self.detail, vectors)} | {f"{step}_{n}": (self.detail, v) for n, v in beside.items()}
        if not self.alone and self.plan.edits == "all":
            edits |= {o: (self.detail, self.ablated(o)) for o in REFERENCES if o not in edits}
            away = -self.direction * torch.where(cosine(self.x, self.direction) < 0, -1.0, 1.0)[:, None].to(
                self.direction
            )
            towards = {ROTATE: away} | {f"{ROTATE}_{name}": self.noise[name] for name in PLACEBOS}
            edits |= {n: (self.detail, rotate_by_angle(self.x, to, self.plan.angle)) for n, to in towards.items()}
        edits["self"] = (self.again, self.x.clone())
        if self.dictionary.sae is not None:  # removing nothing is no ablation
            fires = (self.z != 0).cpu().numpy()
            for name in ("latent", *(PLACEBOS if reference == "latent" else ())):
                if name in edits:
                    edits[name] = (edits[name][0] & fires, edits[name][1])
        else:
            edits.pop("latent", None)
        return _joined([self._some(name, where, vectors, self.x) for name, (where, vectors) in edits.items()])

    def scaled(self) -> EditedRows:
        """Ablations of s·x and their placebos, each compared with the run with s·x."""
        parts = []
        for scale in SCALES:
            clean = rescale(self.x, scale)
            edited = self.ablated("zero", clean)
            edits = {"scaled": edited}
            edits |= {f"scaled_{name}": vectors for name, vectors in self.placebos(clean, edited).items()}
            parts += [self._some(edit, self.detail, vectors, clean, scale) for edit, vectors in edits.items()]
        return _joined(parts)

    def placebos(self, x: Tensor, edited: Tensor) -> dict[str, Tensor]:
        """An edit's `PLACEBOS`, which turn to the same random direction whatever the edit and the length of x.

        Of x less the share λ of its projection on d̂ it is x less the share λ of its projection on one d̂', whatever λ and s:
        d̂ turned about x, so that cos(x, d̂') = cos(x, d̂).
        """
        return {name: matched_placebo(x, edited, towards) for name, towards in self.noise.items()}

    def _some(self, edit: str, where: np.ndarray, vectors: Tensor, clean: Tensor, scale: float = 1.0) -> EditedRows:
        index = torch.from_numpy(np.flatnonzero(where)).to(self.x.device)
        vectors, clean = vectors[index], clean[index]
        removed = {"half": 0.5, "self": 0.0}.get(edit.partition("_")[0], 1.0)
        table = self.table.loc[where].assign(
            edit=edit, scale=scale, removed=removed, **dose_columns(clean, vectors[:, None])
        )
        return EditedRows(table.reset_index(drop=True), vectors, clean)


COLUMNS = (
    "model", "layer", "point", "context", "sae", "latent", "target_prompt", "target_position", "edit", "scale",
    "frequency", "latent_weight", "token_weight", "learned_a", "norm_quartile", "norm", "norm_centred", "norm_read", "cosine",
    "inner", "cosine_centred", "inner_centred", "cosine_encoder", "inner_encoder", "cosine_encoder_centred",
    "inner_encoder_centred", "activation", "dose_zero", "dose_mean", "dose_latent", "removed", "delta_norm", "delta_angle", "kl", "js",
    "clean_entropy", "top1_changed", "kl_direct",
)  # fmt: skip
"""Of the table. edit: one of `EDITS`; scale: s where the edited and the clean run have s·x in place of x, else 1; removed: share of
the projection taken away, or that the edit has whose placebo it is. frequency: share of usable tokens on which the latent fires;
latent_weight, token_weight: how many latents of the SAE, tokens of the text, each stands for; learned_a: the exponent of a
cosine-scored SAE. norm_quartile: 0 to 3, of ‖x‖ over the site's usable tokens; norm_read: what the next block's norm divides by,
‖x − mean(x)‖ under LayerNorm, ‖x‖ under RMSNorm. cosine, inner: of x (`_centred`: of x_c) and the decoder row (`_encoder`: the
encoder row; nan where there is none); activation: z. dose_zero, dose_mean, dose_latent: |<x, d̂>|, |<x − μ, d̂>|, |z|·‖d‖, what
the three references remove; delta_norm, delta_angle: of this edit, L2 norm and radians. Effects as in the direction-norm table,
nats."""
