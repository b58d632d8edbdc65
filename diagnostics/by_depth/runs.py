"""Runs drawn together: which points form one line, what a line is called, and the caption."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from diagnostics.figures.axes import path_said, sink_rule, text_names, wrapped
from diagnostics.figures.by_depth import DepthPlan
from diagnostics.figures.looks import LABELS
from diagnostics.statistics.tables import TRAINED

_COUNTS = (
    "pairs_asked",
    "tokens_asked",
    "n_latents",
    "tokens_per_latent",
    "splice_prompts",
    "path_share",
    "steps",
    "samples",
)
"""Settings that must agree for two runs to be one line at different depths."""


def facts(provenance: Mapping[str, Any]) -> dict[str, str]:
    """The facts by which two runs may differ, in words."""
    p = provenance
    prompts = p["prompts"] if "prompts" in p else " + ".join(str(t["prompts"]) for t in p["texts"].values())
    return {
        "model": p["model"],
        "note": p["model_note"] or p["norm"],
        "wrapper": p["wrapper"],
        "dtype": p["dtype"],
        "text": text_names(p),
        "prompts": f"{prompts} prompts",
        "seed": f"seed {p['seed']}" if "seed" in p else "",
        "sinks": sink_rule(p),
        "context": " and ".join(LABELS[c] for c in p["context"]) if "context" in p else "",
    }


def identity(provenance: Mapping[str, Any]) -> str:
    """What two runs must share to form one line: facts, weights, texts and sizes of samples; not depths, SAEs or machine."""
    p = provenance
    texts = p.get("texts") or {"": p["text"]}
    hashes = {name: text.get("sha256") for name, text in texts.items()}
    return json.dumps([facts(p), p["weights_sha256"], hashes, {k: p.get(k) for k in _COUNTS}], sort_keys=True)


def said_of(settings: Mapping[str, Any]) -> str:
    """Settings of a panel in words: `resid_post`, `mlp_out, horizon: 8`."""
    parts = []
    for name, value in settings.items():
        if name == "point":
            parts.append(str(value))
        elif (name, value) != ("horizon", 1):
            parts.append(f"{name}: {value}")
    return ", ".join(parts)


def labels(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """A name for each run: the facts by which the runs differ, and the folder where these do not tell them apart."""
    every = {run: facts(p) for run, p in runs.items()}
    differ = [name for name in next(iter(every.values())) if len({f[name] for f in every.values()}) > 1]
    told = [name for name in differ if name not in ("note", "context")] or differ
    found = {run: ", ".join(f[name] for name in told) for run, f in every.items()}
    if len(set(found.values())) < len(found):
        found = {run: ", ".join(filter(None, (words, run))) for run, words in found.items()}
    return found


def caption(plan: DepthPlan, table: pd.DataFrame, runs: Mapping[str, Mapping[str, Any]], inches: float) -> str:
    """The caption: what is shown, n, model, text, seed, sink filter and context, by line where runs differ."""
    main = table.loc[(table["network"] == TRAINED) & (table["role"] == "main")]
    sampled = main.loc[main["n_prompts"] > 0]
    counts = f"n = {_range((sampled if len(sampled) else main)['n'])} {plan.unit}"
    every = {run: facts(p) for run, p in runs.items()}
    prompts = f"{_range(sampled['n_prompts'])} prompts" if len(sampled) else ""
    uneven = sampled.loc[sampled["n_effective"] < 0.9 * sampled["n_prompts"], "n_effective"]
    counts += f" of {prompts}" if prompts and {f["prompts"] for f in every.values()} != {prompts} else ""
    counts += f", effective prompts {uneven.min():.3g} or more" if len(uneven) else ""
    names = labels(runs) if len(runs) > 1 else {}
    first = next(iter(every.values()))
    contexts = {context for p in runs.values() for context in p.get("context", ())}
    said = "context" if contexts & {*table["row"], *table["series"]} else ""  # by panels or legend
    common = [name for name in first if len({f[name] for f in every.values()}) == 1 and name != said]
    parts = [f"{plan.what}. {counts}. {_listed(first, common)}."]
    if len(runs) > 1:
        parts.append(f"Runs: {'; '.join(_told(names[run], every[run], common) for run in runs)}.")
    parts.append(f"{_first_up(plan.done)} at {table['setting'].iloc[0]}.")
    parts.append(f"Bars: {plan.bars}.")
    parts += _notes(plan, table)
    parts.append(f"By {path_said(runs.values())}.")
    return wrapped(" ".join(parts), inches)


def _notes(plan: DepthPlan, table: pd.DataFrame) -> list[str]:
    found = []
    if (table["network"] != TRAINED).any():
        n = table.loc[table["network"] != TRAINED, "network"].nunique()
        found.append(f"Grey: {n} randomly initialised model{'s' if n > 1 else ''}.")
    if (table["role"] != "main").any():
        found.append(f"Broad pale bars: {plan.placebo}.")
    if (table["state"] == "lower bound").any():
        found.append("Arrows: lower bounds.")
    if (table["state"] == "no effect").any():
        low = max(panel.lowest for panel in plan.panels.values())
        found.append(f"Open: within 10 noise floors{f', or below {low:g}' if low > 0 else ''}.")
    lost = table["state"].isin(("undefined", "not identified"))
    if lost.any():
        said = "not identified" if (table["state"] == "not identified").any() else "undefined"
        found.append(f"Not drawn: {int(lost.sum())} of {len(table)} values ({said}).")
    effective = table["n_effective"].fillna(table["n_prompts"])
    if (effective.between(0, 10, inclusive="neither") & table["low"].isna()).any():
        found.append("Points without a bar: fewer than 10 effective prompts, no interval.")
    return found


def _told(name: str, every: Mapping[str, str], common: list[str]) -> str:
    """A run's name, with the differing facts that the name does not say."""
    own = {fact: value for fact, value in every.items() if fact not in common}
    more = _listed(own, [fact for fact, value in own.items() if value not in name])
    return f"{name} ({more})" if more else name


def _listed(every: Mapping[str, str], names: Iterable[str]) -> str:
    """Facts in one phrase: `smollm2-135m (note; float32), 100 prompts of boolq, seed 0, …`."""
    some = {name: every[name] for name in names}
    inner = "; ".join(some.pop(name) for name in ("note", "dtype", "wrapper") if name in some)
    model = some.pop("model", "")
    head = f"{model} ({inner})" if model and inner else model or inner
    if "prompts" in some and "text" in some:
        some = {"text": f"{some.pop('prompts')} of {some.pop('text')}", **some}
    return ", ".join(filter(None, [head, *some.values()]))


def _range(values: pd.Series) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _first_up(words: str) -> str:
    return words[:1].upper() + words[1:]
