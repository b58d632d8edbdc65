"""Results made up for figures: every value a function of its place, nothing measured."""

from dataclasses import replace

import numpy as np
import pandas as pd

from diagnostics.atlas.result import CausalAtlas
from diagnostics.direction_vs_norm.result import DirectionNorm
from diagnostics.dose.result import DoseResponse
from diagnostics.figures.looks import EDIT_LABELS
from diagnostics.projections.result import ProjectionEffects
from diagnostics.sae_evaluation.measures import MEASURES
from diagnostics.sae_evaluation.result import SAEEvaluation
from diagnostics.sampling.counted import ALL, NO_SINKS, QUARTILES
from diagnostics.statistics.estimate import CensoredMedian, Estimate, FiellerInterval
from diagnostics.unit_norm.result import UnitNorm
from diagnostics.win_rate.result import WinRateReport

LAYERS, NETWORKS, CONTEXTS = (1, 4), ("trained", "random 0"), ("in_place", "single_token")
EMPTY = pd.DataFrame()
SAES = ("7/standard", "15/standard", "15/cosine", "15/cosine-seed1")


def estimate(*place: object) -> Estimate:
    """A value with an interval, its own for each place."""
    value = 0.2 + 0.1 * np.sin(sum(ord(c) * (i + 1) for i, c in enumerate(str(place))))
    return Estimate(value, 0.9 * value, 1.2 * value, 0.1, 100, 24)


def provenance(**other: object) -> dict:
    found = {
        "model": "some-model", "model_note": "a note", "norm": "RMSNorm", "wrapper": "huggingface", "weights_sha256": "1", "n_layers": 8,
        "dtype": "float32", "text": {"name": "some text", "sha256": "2"}, "sites": ["1.resid_post", "4.resid_post"],
        "context": list(CONTEXTS), "horizon": 1, "prompts": 24, "sink_filter": 10.0, "seed": 3, "null_models": ["random 0"],
        "pairs_asked": 100, "path": {"1.resid_post": "replay"}, "replay_delta": 2e-5, "vocab": 97,
    }  # fmt: skip
    return found | other


def _places(*more):
    return [(model, layer, *rest) for model in NETWORKS for layer in LAYERS for rest in more]


def direction(**other: object) -> DirectionNorm:
    """Its norm patch has no effect at the last layer, where direction ÷ norm is a bound."""
    edits = ("direction", "placebo_token", "placebo_direction", "norm", "placebo_norm")
    ratios = ("direction ÷ norm", "norm ÷ placebo_norm", "direction ÷ placebo_token", "direction ÷ placebo_direction")
    groups = []
    for model, layer, context in _places(*((c,) for c in CONTEXTS)):
        place = model, layer, context
        group = {
            "pair_set": "random",
            "model": model,
            "layer": layer,
            "context": context,
            "point": "resid_post",
            "noise_floor": 1e-9,
        }
        group["edits"] = {e: {"median_kl": estimate(*place, e)} for e in edits}
        group["ratios"] = {
            r: {"of_means": estimate(*place, r), "median": CensoredMedian(estimate(*place, r), 0, 0, 100)}
            for r in ratios
        }
        if layer == LAYERS[-1]:
            group["edits"]["norm"] = {"median_kl": replace(estimate(*place), value=1e-12, low=1e-13, high=1e-11)}
            bound = Estimate(5000.0, np.nan, np.nan, np.nan, 100, 24, True)
            group["ratios"]["direction ÷ norm"]["median"] = CensoredMedian(bound, 60, 0, 100)
        groups.append(group)
    return made(DirectionNorm, groups, other)


def unit_norm(**other: object) -> UnitNorm:
    names = ("unit_norm", "rotation", "unit_norm_everywhere", "rotation_everywhere")
    names += ("unit_norm ÷ rotation", "unit_norm_everywhere ÷ rotation_everywhere")
    groups = [
        {"model": m, "layer": n, "noise_floor": 1e-9} | {k: estimate(m, n, k) for k in names} for m, n in _places(())
    ]
    return made(UnitNorm, groups, other)


def dose(**other: object) -> DoseResponse:
    groups = []
    for model, layer, amount in _places((0.1,), (0.25,)):
        place = model, layer, amount
        group = {
            "model": model,
            "layer": layer,
            "context": "in_place",
            "point": "resid_post",
            "dose": amount,
            "noise_floor": 1e-9,
        }
        group["edits"] = {
            e: {"median_kl": estimate(*place, e), "direct_over_total": estimate(*place, e, 1)} for e in EDIT_LABELS
        }
        group["ratios"] = {f"{e} ÷ isotropic": estimate(*place, e, 2) for e in EDIT_LABELS}
        groups.append(group)
    return made(DoseResponse, groups, {"doses": [0.1, 0.25], "context": ["in_place"]} | other)


def _sae_places():
    return [(name, int(name.split("/")[0]), context) for name in SAES for context in CONTEXTS]


def projections(**other: object) -> ProjectionEffects:
    """The placebo's exponent at block 7 is not identified."""
    groups = []
    for sae, layer, context in _sae_places():
        ways = {}
        for way in ("observational", "placebo_token", "interventional"):
            e = estimate(sae, context, way)
            kind = "everything" if (way, layer) == ("placebo_token", 7) else "bounded"
            ends = (-np.inf, np.inf) if kind == "everything" else (e.low, e.high)
            ways[way] = type("Way", (), {"a": FiellerInterval(e.value, *ends, kind, 100, 24)})()
        e, less = (estimate(sae, context, f"rescaled {what}") for what in ("placebo", "difference"))
        beside = {"placebo": FiellerInterval(e.value, e.low, e.high, "bounded", 100, 24), "difference": less}
        ways["interventional"].placebos = {"placebo_token": type("Beside", (), beside)()}
        learned = {"mean": 0.05} if "cosine" in sae else None
        groups.append(
            {"model": "trained", "layer": layer, "point": "resid_post", "context": context, "sae": sae, "exponents": ways,
             "learned_a": learned, "n_latents": 30}
        )  # fmt: skip
    how = {"sampling": "stratified", "reference": "zero", "saes": dict.fromkeys(SAES), "null_models": []}
    return made(ProjectionEffects, groups, how | other)


class _Rates:
    def __init__(self, edit: str, *place: object):
        rates = [type("Rate", (), {"estimate": estimate(edit, q, *place)})() for q in range(5)]
        self.edit, self.overall, self.quartiles = edit, rates[0], tuple(rates[1:])


def wins(**other: object) -> WinRateReport:
    contests = []
    for sae, layer, context in _sae_places():
        rates = type(
            "Rates", (), {"edit": "zero", "signed": False, "absolute": True, "main": _Rates("zero", sae, context)}
        )()
        rates.placebos = {name: _Rates(name, sae, context) for name in ("placebo_token", "placebo_isotropic")}
        place = {"model": "trained", "layer": layer, "point": "resid_post", "context": context, "sae": sae}
        contests.append(type("Contest", (), {"run": "one", "place": place, "rates": rates})())
    return WinRateReport(contests, {"one": projections(**other)})


def evaluation(names: tuple[str, ...] = SAES, **other: object) -> SAEEvaluation:
    lines, latents = [], []
    for sae in names:
        layer = int(sae.split("/")[0])
        for corpus in ("one", "two"):
            for tokens in (ALL, NO_SINKS):
                for quartile in QUARTILES:
                    line = {
                        "sae": sae,
                        "site": f"{layer}.resid_post",
                        "layer": layer,
                        "point": "resid_post",
                        "corpus": corpus,
                    }
                    line |= {"tokens": tokens, "quartile": quartile, "d_sae": 50, "dead": 5, "dead_share": 0.1}
                    for measure in MEASURES:
                        e = estimate(sae, corpus, tokens, quartile, measure)
                        line |= {
                            measure: e.value,
                            f"{measure}_low": e.low,
                            f"{measure}_high": e.high,
                            f"{measure}_se": e.se,
                        }
                    lines.append(
                        line | {f"n_{of}{what}": 24 for of in ("", "kl_", "ce_") for what in ("tokens", "prompts")}
                    )
        table = pd.DataFrame({"sae": sae, "corpus": "one", "latent": np.arange(50), "fired": np.arange(50) // 5})
        table["alignment"] = table["cosine"] = 0.5 + 0.3 * np.sin(np.arange(50) * len(sae))
        table["exponent"] = np.cos(np.arange(50)) if "cosine" in sae else np.nan
        latents.append(table)
    texts = {name: {"name": name, "sha256": name, "prompts": 24, "tokens": 999} for name in ("one", "two")}
    p = provenance(
        saes={name: {} for name in names}, texts=texts, splice_sinks=False, null_models=[], left_out={}, why_hooks=None
    )
    p = {k: v for k, v in p.items() if k not in ("text", "prompts", "seed", "context", "horizon")} | other
    return SAEEvaluation(pd.DataFrame(lines), [[1]], p, pd.concat(latents, ignore_index=True))


def atlas(**other: object) -> CausalAtlas:
    groups = []
    for sae in SAES[:3]:
        group = {"sae": sae, "layer": int(sae.split("/")[0]), "point": "resid_post", "noise_floor": 1e-9, "rows": 900}
        group |= {"kl": estimate(sae), "kl_over_placebo": estimate(sae, 1), "share_of_largest_hundredth": 0.4}
        group |= {"chance_recall": 0.2, "scored_tokens": 80}
        statistics = ("rank", "recall", "false_negatives")
        group["scores"] = {s: {k: estimate(sae, s, k) for k in statistics} for s in ("delta_norm", "gradient")}
        groups.append(group)
    return made(CausalAtlas, groups, {"saes": dict.fromkeys(SAES[:3]), "context": ["in_place"]} | other)


def made(kind, groups, other):
    """A result whose statistics are these."""
    of = type(kind.__name__, (kind,), {"groups": groups})
    return of(EMPTY, [[1]], provenance(**other))


EVERY = {
    "direction": direction, "unit": unit_norm, "dose": dose, "projections": projections, "wins": wins, "evaluation": evaluation,
    "atlas": atlas,
}  # fmt: skip
