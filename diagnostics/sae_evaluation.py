"""How well SAEs stand for the activations they read: reconstruction, sparsity, what the model makes of it, alignment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy import stats
from typing_extensions import Self

from diagnostics import sae_measures
from diagnostics.progress import Progressing, followed
from diagnostics.results import Result, model_provenance
from diagnostics.sae_measures import ALL, MEASURES, NO_SINKS, QUARTILES
from diagnostics.sae_sites import sae_site
from diagnostics.statistics import Estimate
from diagnostics.stored import Stored
from interventions.errors import ResultError
from interventions.models import wrap
from interventions.recording import record
from interventions.sites import Site
from interventions.texts import Prompts, prompts_for
from sae_models.live import Wrapped, as_sae
from sae_models.sae import SAE
from sae_models.scores import Cosine

UNIFORM = 5 / 9
"""The bimodality coefficient of a uniform distribution: larger ones speak for two modes, or for a heavy skew."""
_KEYS = ("sae", "site", "corpus", "tokens")
_ENDS = ("low", "high", "se")


@dataclass(frozen=True)
class SAEEvaluation(Result):
    """What SAEs keep of the activations at their sites, and how it was measured.

    The table has a line for each SAE × corpus × tokens (`all`, `no sinks`) × quartile of ‖x‖: `MEASURES`, each with `_low`, `_high`
    (95 % delete-one-prompt jackknife) and `_se`, and `dead_share`: of latents that fire on none of the line's `n_tokens` tokens.
    It has no interval, and more tokens make it smaller. KL and CE are of the line's tokens in the spliced prompts.
    """

    latents: pd.DataFrame = field(default_factory=pd.DataFrame)
    """a line for each SAE × corpus × latent: on which share of the tokens and on how many of each quartile it fires (sinks left
    out), its mean activation there, <w_i, d_i> (`alignment`), its cosine, and the exponent a_i of a cosine score"""

    NAME: ClassVar[str] = "sae_evaluation"
    NOTE: ClassVar[str] = (
        "95 % delete-one-prompt jackknife intervals. MSE: summed over d_model. KL and CE scores: against zero ablation, nats."
    )
    LATENTS: ClassVar[str] = "sae_latents.parquet"
    _EXPONENTS: ClassVar[str] = "sae_exponents"
    _ALIGNMENT: ClassVar[str] = "sae_alignment"

    @classmethod
    def files(cls) -> tuple[str, ...]:
        """The files that every result has."""
        return (*super().files(), cls.LATENTS)

    @classmethod
    def read(cls, stored: Stored) -> Self:
        """A result formed of its files."""
        return replace(super().read(stored), latents=stored.table(cls.LATENTS))

    def parts(self) -> dict[str, Any]:
        """Both tables and the token ids by the names of their files."""
        return {self.LATENTS: self.latents} | super().parts()

    @property
    def names(self) -> list[str]:
        """The SAEs, in the order in which they were given."""
        return list(self.provenance["saes"])

    @property
    def corpora(self) -> list[str]:
        """Names of the texts."""
        return list(self.provenance["texts"])

    @property
    def counted(self) -> str:
        """The tokens that figures show and latents are counted on: `no sinks`, or `all` without a sink filter."""
        return NO_SINKS if self.provenance["sink_filter"] else ALL

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """The table's lines, with their measures as estimates."""
        return [_as_group(row) for row in self.frame.to_dict("records")]

    def select(self, **values: str) -> list[dict[str, Any]]:
        """The groups of some sae, corpus, tokens or quartile."""
        return [g for g in self.groups if all(g[name] == value for name, value in values.items())]

    def summary(self) -> pd.DataFrame:
        """A line for each SAE and corpus: all quartiles of the tokens that are no sinks."""
        overall = (self.frame["tokens"] == self.counted) & (self.frame["quartile"] == QUARTILES[0])
        return self.frame.loc[overall].reset_index(drop=True)

    @cached_property
    def alignments(self) -> list[dict[str, Any]]:
        """Of each SAE's live latents (those that fired on some corpus): <w_i, d_i>, their cosine and a_i, and whether there are two modes."""
        return [_alignment(name, rows) for name, rows in self.latents.groupby("sae", sort=False)]

    def as_dict(self) -> dict[str, Any]:
        """Summary, alignment and provenance, as they stand in the JSON file."""
        return {"summary": self.groups, "alignment": self.alignments, "provenance": self.provenance}

    def table(self) -> str:
        """The summary as text, for a terminal."""
        parts = []
        for title, some in self.tables().items():
            parts += [f"{title}:"] * bool(title) + [some.to_string(index=False)] + [self.NOTE] * (not title)
        return "\n".join([*parts, *_left_out(self.provenance)])

    def tables(self) -> dict[str, pd.DataFrame]:
        """Over all quartiles; by quartile; alignment of encoder and decoder."""
        overall = [_overall(g) for g in self.select(quartile=QUARTILES[0])]
        quartiles = [
            _by_quartile(self.select(sae=name, corpus=corpus, tokens=self.counted))
            for name in self.names
            for corpus in self.corpora
        ]
        aligned = [{k: f"{v:.3g}" if isinstance(v, float) else v for k, v in g.items()} for g in self.alignments]
        speaks = f"a bimodality above {UNIFORM:.2f}, a uniform distribution's, speaks for two modes"
        return {
            "": pd.DataFrame(overall),
            f"By quartile of ‖x‖, {self.counted if self.counted == NO_SINKS else 'all tokens'}": pd.DataFrame(
                quartiles
            ),
            f"Alignment <w, d> of live latents; {speaks}": pd.DataFrame(aligned),
        }

    def plot(self, tokens: str | None = None) -> Any:
        """FVE and KL score of each SAE by quartile. Returns a matplotlib Figure.

        tokens: `no sinks` (default where there is a sink filter) or `all`.
        """
        from diagnostics.sae_plots import plot_evaluation

        return plot_evaluation(self.groups, self.provenance, tokens or self.counted)

    def figures(self) -> dict[str, Any]:
        """FVE and KL score; histograms of alignment, and of exponents where an SAE has them."""
        from diagnostics.sae_plots import plot_alignment, plot_exponents

        found, site = {self.NAME: self.plot()}, {g["sae"]: g["site"] for g in self.groups}
        facts = [g | {"site": site[g["sae"]]} for g in self.alignments]
        latents = self.latents.assign(live=_fired(self.latents)).drop_duplicates(["sae", "latent"])
        if latents["alignment"].notna().any():
            found[self._ALIGNMENT] = plot_alignment(latents, facts, self.provenance)
        if latents["exponent"].notna().any():
            found[self._EXPONENTS] = plot_exponents(latents, facts, self.provenance)
        return found


def _as_group(row: dict[str, Any]) -> dict[str, Any]:
    columns = {f"{name}_{end}" for name in MEASURES for end in _ENDS}
    group = {k: v for k, v in row.items() if k not in MEASURES and k not in columns}
    for name in MEASURES:
        of = {"kl": "kl_", "ce": "ce_"}.get(name[:2], "")
        counts = row[f"n_{of}tokens"], row[f"n_{of}prompts"]
        low, high, se = (row[f"{name}_{end}"] for end in _ENDS)
        group[name] = Estimate(row[name], low, high, se, *counts)
    return group


def _overall(group: dict[str, Any]) -> dict[str, Any]:
    labels = {"fve": "FVE", "mse": "MSE", "l0": "L0", "cosine": "cos", "norm_ratio": "‖x̂‖/‖x‖"}
    scores = {"kl_score": "KL score", "ce_score": "CE score", "kl": "KL"}
    line = {name: group[name] for name in _KEYS} | {label: str(group[name]) for name, label in labels.items()}
    line |= {"dead": f"{group['dead_share']:.1%} of {group['d_sae']} on {group['n_tokens']}"}
    return line | {label: str(group[name]) for name, label in scores.items()}


def _by_quartile(groups: list[dict[str, Any]]) -> dict[str, Any]:
    line = {"sae": groups[0]["sae"], "corpus": groups[0]["corpus"]}
    for measure, label in (("fve", "FVE"), ("kl_score", "KL score"), ("norm_ratio", "‖x̂‖/‖x‖")):
        line |= {f"{label} {g['quartile']}": f"{g[measure].value:.3g}" for g in groups[1:]}
    return line


def _left_out(provenance: dict[str, Any]) -> list[str]:
    """What the reader must know is missing, and what served instead of the blocks above; a line each."""
    found = []
    for corpus, sites in provenance["left_out"].items():
        for site, counts in sites.items():
            some = ", ".join(f"{n} {reason}" for reason, n in counts.items() if n)
            found += [f"{corpus}, {site}: {some}"] if some else []
    return found + [f"full forward passes: {why}" for why in provenance["why_hooks"] or ()]


def bimodality(x: Float[ndarray, "value"]) -> float:
    """Sarle's bimodality coefficient with the correction for finite samples: 5/9 for a uniform, 1/3 for a normal distribution.

        (g² + 1) / (k + 3(n − 1)²/((n − 2)(n − 3))),      g, k: sample skewness and excess kurtosis, unbiased

    nan for fewer than 4 values, and for values all the same to rounding. A heavy skew raises it too: look at the histogram.
    Source: SAS/STAT user's guide 1990; Pfister et al. 2013.
    """
    n = len(x)
    if n < 4 or np.std(x) <= 1e-5 * np.abs(x).max():
        return float("nan")
    skew, kurtosis = stats.skew(x, bias=False), stats.kurtosis(x, bias=False)
    return float((skew**2 + 1) / (kurtosis + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3))))


def live(latents: pd.DataFrame) -> pd.DataFrame:
    """One line for each latent that fired on some corpus, of a table of latents."""
    return latents.loc[_fired(latents)].drop_duplicates(["sae", "latent"])


def _fired(latents: pd.DataFrame) -> pd.Series:
    """Whether each line's latent fired on some corpus."""
    return cast(pd.Series, latents.groupby(["sae", "latent"], sort=False)["fired"].transform("sum")) > 0


def _alignment(name: Any, rows: pd.DataFrame) -> dict[str, Any]:
    some, every = live(rows), rows.drop_duplicates("latent")
    line: dict[str, Any] = {"sae": name, "latents": len(every), "live": len(some)}
    for column in ("alignment", "cosine"):
        x = some[column].to_numpy(float)
        line |= {column: _mean(x), f"{column} sd": _mean((x - _mean(x)) ** 2) ** 0.5, f"{column} < 0.5": _mean(x < 0.5)}
        line[f"{column} bimodality"] = bimodality(x)
    line["bimodality with the dead"] = bimodality(every.alignment.to_numpy(float))
    a = some.exponent.dropna().to_numpy(float)
    return line | {"exponent": _mean(a), "exponent sd": _mean((a - _mean(a)) ** 2) ** 0.5}


def _mean(x: ndarray) -> float:
    return float(x.mean()) if len(x) else float("nan")


@torch.no_grad()
def evaluate_saes(
    model: Any,
    prompts: Mapping[str, Prompts] | Prompts | Sequence[Sequence[int]] | Sequence[str],
    saes: Mapping[str, Any] | Sequence[Any],
    *,
    sink_filter: float | None = 10.0,
    skip_first: int = 1,
    splice_prompts: int | None = 50,
    splice_sinks: bool = False,
    path: str = "auto",
    progress: Progressing = None,
) -> SAEEvaluation:
    """Evaluate SAEs, each at its own site of one model, on one text or several: `MEASURES`, by quartile of ‖x‖, and latent by latent.

    prompts: by the name of their corpus, or those of one. saes: anything that `as_sae` takes (ours, live SAELens objects), by
    name; a list is named by what they are. sink_filter: of
    `no sinks`, times the site's median ‖x‖; None or 0: there is only `all`. skip_first: tokens at the beginning of each prompt that
    `no sinks` leaves out as well: at some depths the first is a sink whose norm does not show it. splice_prompts: KL and CE are measured on so many of
    each corpus' prompts, its first (None: all), for each SAE costs a pass through the blocks above; all else is measured on all.
    splice_sinks: in `no sinks` replace the sinks too, uncounted (default: they stay, for later tokens read them). path: as in
    `spliced`. progress: called with steps done and their total.

    Intervals are over prompts. Training seeds are SAEs beside one another: points, never an interval.
    Memory: activations of all sites at all tokens, and a few times 2²³ numbers (2²⁶ on a GPU) for latents.
    Raises `BelongingError` or `SiteError` for an SAE of another width, model or site, before anything runs; `ResultError` for
    no SAEs, no text or settings out of range.
    """
    model = wrap(model)
    named = _named(saes)
    sites = {name: sae_site(sae, model) for name, sae in named.items()}
    texts = {name: prompts_for(model, some) for name, some in _corpora(prompts).items()}
    if (sink_filter or 0) < 0 or (splice_prompts is not None and splice_prompts < 1):
        raise ResultError(
            f"sink filter {sink_filter}, {splice_prompts} spliced prompts; expected 0 or more, and 1 or more"
        )
    by_site = {site: [name for name in named if sites[name] == site] for site in dict.fromkeys(sites.values())}
    steps = [
        min(splice_prompts or len(text.tokens), len(text.tokens)) * (len(names) + 2) * (2 if sink_filter else 1)
        for text in texts.values()
        for names in by_site.values()
    ]
    lines, latents, notes = [], [], _Notes()
    with followed(progress, "splicing", "prompt") as told:
        tick = lambda n: told(n, sum(steps)) if told is not None else None  # noqa: E731
        for corpus, text in texts.items():
            recording = record(model, text.tokens, tuple(by_site), keep_cache=False)
            for site, names in by_site.items():
                tokens = sae_measures.Tokens(recording, site, text.special, sink_filter or None, skip_first)
                some = {name: named[name] for name in names}
                splices = sae_measures.spliced_stream(tokens, some, splice_prompts, splice_sinks, path, tick)
                notes.add(corpus, tokens, splices, names)
                for name, sae in some.items():
                    passed = sae_measures.encoded(sae, tokens)
                    keys = {"sae": name, "site": str(site), "layer": site.layer, "point": site.point, "corpus": corpus}
                    lines += [keys | _as_row(line) for line in sae_measures.lines(tokens, passed, splices, name)]
                    latents.append(_latents(name, corpus, sae, passed, tokens))
    provenance = {
        "diagnostic": SAEEvaluation.NAME,
        **model_provenance(model),
        "saes": {name: _described(sae, sites[name]) for name, sae in named.items()},
        "sites": [str(site) for site in by_site],
        "texts": {
            name: {**text.provenance, "prompts": len(text.tokens), "tokens": sum(map(len, text.tokens))}
            for name, text in texts.items()
        },
        "sink_filter": sink_filter or None,
        "skip_first": skip_first,
        "splice_prompts": splice_prompts,
        "splice_sinks": splice_sinks,
        **notes.as_dict(),
        "null_models": [],
    }
    every = [tokens for text in texts.values() for tokens in text.tokens]
    order = {name: i for i, name in enumerate(named)}
    frame = pd.DataFrame(lines).sort_values("sae", key=lambda s: s.map(order), kind="stable", ignore_index=True)
    table = pd.concat(latents, ignore_index=True)
    table = table.sort_values("sae", key=lambda s: s.map(order), kind="stable", ignore_index=True)
    return SAEEvaluation(frame, every, provenance, table)


def _named(saes: Mapping[str, Any] | Sequence[Any]) -> dict[str, SAE]:
    """SAEs by name, each once."""
    if not len(saes):
        raise ResultError("no SAE; give at least one")
    if isinstance(saes, Mapping):
        return {name: as_sae(sae) for name, sae in saes.items()}
    found: dict[str, SAE] = {}
    for sae in map(as_sae, saes):
        name = f"{sae.score.kind}:{sae.selector.kind} {sae.d_sae} {sae.hook_name}"
        same = sum(other == name or other.startswith(f"{name} #") for other in found)
        found[f"{name} #{same + 1}" if same else name] = sae
    return found


def _corpora(prompts: Any) -> dict[str, Any]:
    """Prompts by the name of their corpus."""
    named = isinstance(prompts, Mapping) and "input_ids" not in prompts  # else a tokenizer's output
    found = prompts if named else {"given": prompts}
    if isinstance(prompts, Prompts):
        found = {str(prompts.provenance.get("name", "given")): prompts}
    if not found:
        raise ResultError("no text; give at least one")
    return dict(found)


def _as_row(line: dict[str, Any]) -> dict[str, Any]:
    """A line as a row of the table: estimates as four columns each, and what they were counted on once."""
    row = {name: value for name, value in line.items() if not isinstance(value, Estimate)}
    for of, name in (("", "fve"), ("kl_", "kl"), ("ce_", "ce")):
        row |= {f"n_{of}tokens": line[name].n_rows, f"n_{of}prompts": line[name].n_prompts}
    for name in MEASURES:
        row |= {name: line[name].value, **{f"{name}_{end}": getattr(line[name], end) for end in _ENDS}}
    return row


def _latents(
    name: str, corpus: str, sae: SAE, passed: sae_measures.Encoded, tokens: sae_measures.Tokens
) -> pd.DataFrame:
    fired = passed.fired[tokens.strict]
    total = fired.sum(0)
    if isinstance(sae.score, Wrapped):  # an encoder without rows
        aligned = length = torch.full((sae.d_sae,), torch.nan, dtype=torch.float64)
    else:
        aligned = sae.alignment().double()
        length = sae.encoder_rows().double().norm(dim=-1) * sae.W_dec.double().norm(dim=-1)
    exponent = sae.score.exponents().double().cpu().numpy() if isinstance(sae.score, Cosine) else np.nan
    with np.errstate(invalid="ignore"):
        table = pd.DataFrame(
            {
                "sae": name,
                "corpus": corpus,
                "latent": np.arange(sae.d_sae, dtype=np.int32),
                "frequency": total / tokens.counted[tokens.strict].sum(),
                "fired": total,
                **{f"fired_{quartile.lower()}": n for quartile, n in zip(QUARTILES[1:], fired, strict=True)},
                "mean_activation": passed.activation / np.where(total > 0, total, np.nan),
                "alignment": aligned.cpu().numpy(),
                "cosine": (aligned / length.clamp(min=1e-12)).cpu().numpy(),
                "exponent": exponent,
            }
        )
    return table.astype({column: "float32" for column, kind in table.dtypes.items() if kind.kind == "f"})


class _Notes:
    """What was left out, and which path ran, over corpora and sites."""

    def __init__(self) -> None:
        self.left_out: dict[str, dict[str, dict[str, int]]] = {}
        self.paths: dict[str, set[str]] = {}
        self.why: set[str] = set()
        self.deltas: list[float] = []

    def add(
        self, corpus: str, tokens: sae_measures.Tokens, splices: sae_measures.Splices, names: Sequence[str]
    ) -> None:
        counts = self.left_out.setdefault(corpus, {})[str(tokens.site)] = dict(tokens.left_out)
        for counted, found in splices.items():
            self.paths.setdefault(str(tokens.site), set()).add(found.path)
            self.why |= {found.why_hooks} if found.why_hooks else set()
            self.deltas.append(found.delta)
            for name in (*names, sae_measures.ZERO, sae_measures.MEAN):
                counts[f"KLs not finite ({counted}, {name.strip()})"] = found.n_nonfinite[name]

    def as_dict(self) -> dict[str, Any]:
        known = [delta for delta in self.deltas if np.isfinite(delta)]
        return {
            "left_out": self.left_out,
            "path": {site: "+".join(sorted(found)) for site, found in self.paths.items()},
            "why_hooks": sorted(self.why) or None,
            "path_delta": max(known, default=None),
        }


def _described(sae: SAE, site: Site) -> dict[str, Any]:
    return {
        "site": str(site),
        "d_sae": sae.d_sae,
        "score": sae.score.kind,
        "selector": sae.selector.settings(),
        "normalise": sae.normalise.settings(),
        "restore_norm": sae.restore_norm,
        "model_name": sae.model_name,
        "metadata": sae.metadata,
    }
