"""A unit of work: the matrices G = E[JᵀMJ] of one model at one site, their spectra, and what spans of decoder rows hold of them."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from diagnostics.causal_dimension.products import METRICS, jacobian_products
from diagnostics.causal_dimension.spectra import STATISTICS, dimension, spectrum
from diagnostics.running.clean import CleanActivations, RunSettings
from diagnostics.running.notes import merged, noted
from diagnostics.running.units import Tick, Unit, UnitResult, narrowed
from diagnostics.sampling.tokens import generator, ranked_tokens
from diagnostics.statistics.estimate import effective_number
from diagnostics.statistics.tables import TRAINED, lines_of, one_table, where
from interventions.errors import ResultError
from interventions.models.causal_model import CausalModel
from interventions.models.loading import untrained
from interventions.sites import Site
from interventions.texts.prompts import Prompts
from sae_models.active_latents import active_latents
from sae_models.dictionaries import Dictionary

PARTS = {"1/8": 8, "1/4": 4, "1/2": 2}
"""Shares of the tokens whose own matrices show how κ grows with their number: disjoint, in the order of the draw."""
WHOLE, WITHOUT = "all", "without"
ROWS = ("most_active", "random", "principal", "eigenvectors")
"""Spans: of the k decoder rows of largest Σ|z|‖d‖; of k random rows of latents that fire (mean of 8 draws); of the first k principal
components of the activations; of the first k eigenvectors of G itself, which hold the most that any k directions can. No decoder rows where fewer
than k latents fire."""
DRAWS = 8
_KEYS = ("model", "layer", "point", "matrix")
DIMENSIONS = (*_KEYS, "part", "which", "tokens", "effective_tokens", "trace", *STATISTICS)
SPECTRUM = (*_KEYS, "index", "eigenvalue")
SPANS = ("sae", "layer", "point", "matrix", "rows", "k", "target_prompt", "tokens", "inside", "trace")
TABLES = {"dimensions": DIMENSIONS, "spectrum": SPECTRUM, "spans": SPANS}
"""Columns of the tables of a unit: a line for each model × site × matrix and part of the tokens; each eigenvalue; each span and prompt.
effective_tokens: (Σ t)² / Σ t², t the traces of the tokens: few where some tokens carry G."""
_WHOLE_NUMBERS = ("layer", "which", "tokens", "index", "k", "target_prompt")


class DimensionRunner:
    """Computes units, one model at a time in memory."""

    def __init__(
        self, model: CausalModel, prompts: Prompts, settings: RunSettings, tokens: int, directions: int | None,
        dictionaries: Sequence[Dictionary], spans: Sequence[int],
    ):  # fmt: skip
        self.model, self.prompts, self.settings, self.tokens = model, prompts, settings, tokens
        self.directions, self.dictionaries, self.spans = directions, dictionaries, spans
        self.labels = [TRAINED, *(f"random {seed}" for seed in range(settings.null_seeds))]
        self._current: tuple[str, CleanActivations] | None = None

    def units(self) -> list[Unit]:
        rows = self.tokens * (self.directions or self.model.d_model)
        return [
            Unit.of(rows=rows, group=(label, i), model=label, site=str(site))
            for label in self.labels
            for i, site in enumerate(self.settings.sites)
        ]

    def of(self, label: str) -> CleanActivations:
        """The clean activations of a model of the run; a randomly initialised one is made when it is asked for."""
        if self._current is None or self._current[0] != label:
            self._current = None  # before another model's activations are recorded
            model = self.model if label == TRAINED else untrained(self.model, int(label.split()[1]))
            self._current = (label, CleanActivations(model, self.prompts, self.settings))
        return self._current[1]

    @torch.no_grad()
    def __call__(self, unit: Unit, tick: Tick) -> tuple[pd.DataFrame, dict[str, Any]]:
        clean, site = self.of(unit["model"]), Site.parse(unit["site"])
        work = _Site(clean, site, self.tokens, self.directions)
        notes = work.fill(tick)
        tables = {
            "dimensions": work.dimensions(),
            "spectrum": work.spectra(),
            "spans": pd.DataFrame(columns=list(SPANS)),
        }
        if unit["model"] == TRAINED:
            own = [work.spans(d, self.spans) for d in self.dictionaries if d.site == site]
            tables["spans"] = one_table([tables["spans"], *own])
        keys = {"model": unit["model"], "layer": site.layer, "point": site.point}
        if unit["model"] != TRAINED:
            notes["rows_dropped"] = {f"{unit['model']}: {reason}": n for reason, n in notes["rows_dropped"].items()}
        frame = pd.concat([table.assign(table=name, **keys) for name, table in tables.items() if len(table)])
        return narrowed(_filled(frame.reset_index(drop=True))), notes


def _filled(frame: pd.DataFrame) -> pd.DataFrame:
    """One table of several: cells that a line has no use for are 0 or empty."""
    words = [name for name in frame if frame[name].dtype.kind not in "biuf"]
    return frame.fillna({name: "" if name in words else 0 for name in frame})


def split(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The tables of all units."""
    found = {}
    for name, columns in TABLES.items():
        lines = lines_of(frame, table=name).reindex(columns=list(columns)).reset_index(drop=True)
        found[name] = lines.astype({c: "int32" for c in columns if c in _WHOLE_NUMBERS})
    return found


def joined(done: Sequence[UnitResult]) -> dict[str, Any]:
    """The units' notes as one; the agreement of forward mode with central differences is the worst."""
    agreement = [one.notes["second_order"] for one in done]
    worst = np.array([note["agreement"] for note in agreement if note["agreement"] is not None], dtype=float)
    return merged(done, "model") | {
        "second_order": {
            "method": "+".join(sorted({note["method"] for note in agreement})),
            "agreement": float(worst.max()) if len(worst) else None,
            "why_central": sorted({note["why_central"] for note in agreement} - {None}) or None,
        }
    }


class _Site:
    """One model at one site: the tokens drawn, and the sums of their matrices."""

    def __init__(self, clean: CleanActivations, site: Site, asked: int, directions: int | None):
        self.clean, self.site, self.sketched = clean, site, directions is not None
        seed, model = clean.settings.seed, clean.model
        prompt, position = (part[:asked] for part in ranked_tokens(clean.length, seed, "causal_dimension"))
        keep = clean.usable[prompt, position]
        left = {reason: int(bad[prompt, position].sum()) for reason, bad in clean.filter.reasons.items()}
        self.found: dict[str, Any] = {"pairs_dropped": {r: n for r, n in left.items() if n}}
        if not keep.any():
            raise ResultError(
                f"none of {asked} tokens is left, dropped: {self.found['pairs_dropped']}; give other text"
            )
        self.prompt, self.position = prompt[keep], position[keep]
        self.basis = torch.eye(model.d_model, dtype=model.stream_dtype, device=model.device)
        if directions is not None:
            drawn = torch.randn(
                model.d_model, directions, generator=generator(seed, "directions", site), dtype=torch.float64
            )
            self.basis = torch.linalg.qr(drawn).Q.T.to(self.basis)
        self.names = [*METRICS, *([] if self.sketched else [f"{name}_rotated" for name in METRICS])]
        self.group = np.unique(self.prompt, return_inverse=True)[1]
        self.eighth = np.arange(len(self.prompt)) * 8 // len(self.prompt)
        size = (len(self.basis),) * 2
        zeros = lambda n: torch.zeros(n, *size, dtype=torch.float64, device=model.device)  # noqa: E731
        self.by_prompt = {name: zeros(int(self.group.max()) + 1) for name in METRICS}
        self.by_eighth = {name: zeros(8) for name in self.names}
        self.traces = {
            name: torch.zeros(len(self.prompt), dtype=torch.float64, device=model.device) for name in METRICS
        }
        self.good = np.ones(len(self.prompt), dtype=bool)

    def fill(self, tick: Callable[[int], object]) -> dict[str, Any]:
        """Form the matrices of every token; the unit's notes."""
        notes: dict[str, Any] = {"path": None}
        methods: set[str] = set()
        why: set[str] = set()
        agreement: list[float] = []
        for number, among in enumerate(self.clean.shards):
            here = np.flatnonzero(np.isin(self.prompt, among))
            here = here[np.lexsort((self.position[here], self.prompt[here]))]
            if not len(here):
                continue
            found = jacobian_products(
                self.clean.recording(number), self.site,
                torch.from_numpy(self.prompt[here] - among[0]), torch.from_numpy(self.position[here]), self.basis,
                lambda i, matrices, here=here: self._add(here[i], matrices),
                path=self.clean.settings.path, batch_rows=self.clean.settings.batch_rows, progress=tick,
            )  # fmt: skip
            self.good[here] = found.finite.numpy()
            noted(notes, found)
            methods.add(found.method)
            why |= {found.why_central} if found.why_central else set()
            agreement.append(found.agreement)
        if not self.good.any():
            raise ResultError(
                f"the Jacobian at {self.site} is not finite at any of {len(self.good)} tokens; use float32"
            )
        bad = int((~self.good).sum())
        self.found["tokens_used"] = int(self.good.sum())
        worst = float(np.nanmax(agreement)) if np.isfinite(agreement).any() else None
        second = {"method": "+".join(sorted(methods)), "agreement": worst, "why_central": min(why, default=None)}
        dropped = {"Jacobian not finite": bad} if bad else {}
        return notes | {"drawn": self.found, "rows_dropped": dropped, "second_order": second}

    def _add(self, token: int, matrices: Any) -> None:
        at = {"prompt": int(self.prompt[token]), "position": int(self.position[token])}
        turn = None if self.sketched else self._rotation(*at.values())
        for name, matrix in matrices.items():
            self.traces[name][token] = matrix.trace()
            self.by_prompt[name][self.group[token]] += matrix
            self.by_eighth[name][self.eighth[token]] += matrix
            if turn is not None:
                self.by_eighth[f"{name}_rotated"][self.eighth[token]] += turn.T @ matrix @ turn

    def _rotation(self, *token: int) -> Float[Tensor, "d_model d_model"]:
        """A random orthogonal matrix of the token's own."""
        stream = generator(self.clean.settings.seed, "causal_dimension rotation", *token)
        size = len(self.basis)
        drawn = torch.randn(size, size, generator=stream).to(self.basis.device, torch.float64)
        q, r = torch.linalg.qr(drawn)
        return q * r.diagonal().sign()

    def dimensions(self) -> pd.DataFrame:
        """The statistics of G of all tokens, without each prompt, and of parts of the tokens; and of the activations' covariance."""
        lines: list[dict[str, Any]] = []
        traces = {name: values.cpu().numpy() for name, values in self.traces.items()}

        def add(matrix: str, part: str, which: int, total: Tensor, among: np.ndarray) -> None:
            among = among & self.good
            if n := int(among.sum()):
                own = {
                    "tokens": n,
                    "effective_tokens": effective_number(traces[matrix.removesuffix("_rotated")][among]),
                }
                own |= dimension(total / n, self.clean.model.d_model)
                lines.append({"matrix": matrix, "part": part, "which": which} | own)

        for name in self.names:
            whole, every = self.by_eighth[name].sum(0), np.ones(len(self.good), dtype=bool)
            add(name, WHOLE, -1, whole, every)
            for part, pieces in PARTS.items():
                for i, some in enumerate(np.split(np.arange(8), pieces)):
                    add(name, part, i, self.by_eighth[name][some].sum(0), np.isin(self.eighth, some))
            for g, prompt in enumerate(np.unique(self.prompt)) if name in METRICS else ():
                if (mine := self.group == g)[self.good].any():
                    add(name, WITHOUT, int(prompt), whole - self.by_prompt[name][g], ~mine)
        covariance, n = self._covariance
        lines.append(
            {"matrix": "activations", "part": WHOLE, "which": -1, "tokens": n, "effective_tokens": n}
            | dimension(covariance)
        )
        return pd.DataFrame(lines)

    @cached_property
    def _covariance(self) -> tuple[Float[Tensor, "d_model d_model"], int]:
        """Of the activations of all usable tokens of the text."""
        x = self.clean.at(self.site, *self.clean.tokens).double()
        return torch.cov(x.T, correction=0), len(x)

    def spectra(self) -> pd.DataFrame:
        """The eigenvalues of G of all tokens, and of the activations' covariance."""
        n = int(self.good.sum())
        whole = {name: self.by_eighth[name].sum(0) / n for name in self.names} | {"activations": self._covariance[0]}
        found = [
            pd.DataFrame({"matrix": name, "index": np.arange(len(matrix)), "eigenvalue": spectrum(matrix)})
            for name, matrix in whole.items()
        ]
        return pd.concat(found, ignore_index=True)

    def spans(self, dictionary: Dictionary, counts: Sequence[int]) -> pd.DataFrame:
        """tr(QQᵀG_g) and tr G_g of each prompt's sum of matrices G_g, Q an orthonormal basis of a span."""
        assert dictionary.sae is not None
        active = active_latents(dictionary.sae, self.clean.at(self.site, *self.clean.tokens))
        rows = dictionary.directions.to(self.basis.device, torch.float64)
        size = (
            np.bincount(active.latent, weights=np.abs(active.z), minlength=len(rows)) * rows.norm(dim=1).cpu().numpy()
        )
        order, live = np.argsort(-size, kind="stable"), np.flatnonzero(size > 0)
        numbers, n = np.unique(self.prompt), np.bincount(self.group[self.good], minlength=int(self.group.max()) + 1)
        principal = torch.linalg.eigh(self._covariance[0]).eigenvectors.flip(1)
        lines = []
        for metric in METRICS:
            each = self.by_prompt[metric]
            traces = each.diagonal(dim1=1, dim2=2).sum(1).cpu().numpy()
            own = torch.linalg.eigh(each.sum(0)).eigenvectors.flip(1)
            for k in counts:
                bases = {"principal": [principal[:, :k]], "eigenvectors": [own[:, :k]]}
                if k <= len(live):
                    stream = generator(self.clean.settings.seed, "random rows", dictionary.label, k)
                    drawn = [live[torch.randperm(len(live), generator=stream)[:k].numpy()] for _ in range(DRAWS)]
                    bases |= {
                        "most_active": [_basis(rows, order[:k])],
                        "random": [_basis(rows, some) for some in drawn],
                    }
                for kind in (kind for kind in ROWS if kind in bases):
                    inside = torch.stack([((each @ q) * q).sum((1, 2)) for q in bases[kind]]).mean(0)
                    table = {
                        "rows": kind,
                        "k": k,
                        "target_prompt": numbers,
                        "tokens": n,
                        "inside": inside.cpu().numpy(),
                    }
                    lines.append(pd.DataFrame({"sae": dictionary.name, "matrix": metric, **table, "trace": traces}))
        return where(found := pd.concat(lines), found["tokens"].to_numpy() > 0).reset_index(drop=True)


def _basis(rows: Float[Tensor, "latent d_model"], some: np.ndarray) -> Float[Tensor, "d_model k"]:
    return torch.linalg.qr(rows[torch.from_numpy(some).to(rows.device)].T).Q
