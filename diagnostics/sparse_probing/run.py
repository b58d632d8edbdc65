"""`probe_saes`: logistic probes on k latents, beside the raw activations and chance."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from diagnostics.results.calls import recorded
from diagnostics.running.provenance import hashed, run_identity, run_provenance
from diagnostics.running.units import run_units
from diagnostics.sparse_probing import summary as probing_summary
from diagnostics.sparse_probing.pooling import labelled_prompts
from diagnostics.sparse_probing.result import COLUMNS, SparseProbing
from diagnostics.sparse_probing.work import DRAW_COLUMNS, TEXT_COLUMNS, ProbingRunner, of_kind
from interventions.errors import ResultError
from interventions.models.wrapping import wrap
from interventions.progress import Progressing
from interventions.sites import SiteLike, several
from interventions.texts.labelled import Labelled, load_labelled
from sae_models.dictionaries import dictionaries_of


@recorded
@torch.no_grad()
def probe_saes(
    model: Any,
    labelled: Labelled | str | Sequence[Labelled | str],
    saes: Any,
    *,
    site: SiteLike | None = None,
    ks: int | Sequence[int] = (1, 2, 5, 20),
    seeds: int = 3,
    shuffles: int = 200,
    refits: int = 20,
    per_class: int | None = 150,
    max_length: int = 128,
    test_share: float = 0.3,
    inverse_penalty: float = 1.0,
    sink_filter: float | None = 10.0,
    seed: int = 0,
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> SparseProbing:
    """Fit probes of each class against the rest on k latents of each SAE, averaged over each text's tokens.

        z̄(text) = mean of z over the text's tokens
        selected: the k largest |mean of z̄ in the class − mean of z̄ in the rest|

    labelled: sets of texts, or names and files as `load_labelled` takes them (then at most `per_class` of each class). saes: one, or
    several by name, each at the site it belongs to (`site`: where it must). ks: numbers of latents. seeds: splits into training and
    held-out texts, in whole groups (`Labelled.groups`), about `test_share` held out; the same for every SAE. shuffles: of the labels of all
    texts (`shuffled_labels`), with splits, selection and fit anew in each: the null of `selected`; p = (1 + how many reach the
    observed accuracy)/(1 + shuffles). refits: splits, each with selection and fit anew, for the interval that includes them. max_length: tokens
    that a text is cut at. Tokens left out: see `PooledTexts`. Tasks are balanced (`tasks`): chance is .5. inverse_penalty: C of
    scikit-learn's LogisticRegression, features standardised, the same for every k. folder: where finished units, a data set and an SAE each, are kept.

    Probe loss is the cross-entropy of kind `best`, mean over classes: held out, and in `cross_entropy_train` as published, on the
    texts that the probe was fitted and chosen on. Source: arXiv:2606.15054 (mean difference, k-sparse probes), arXiv:2406.04093 (probe
    loss); balanced tasks, nulls and intervals are ours.
    Raises `BelongingError`, `SiteError` for an SAE of another width, model or site; `TextError` for texts that cannot be read;
    `ResultError` for invalid settings.
    """
    model = wrap(model)
    ks = tuple(dict.fromkeys(several(ks)))
    if (
        not ks
        or min(ks) < 1
        or seeds < 1
        or shuffles < 1
        or refits < 2
        or not 0 < test_share < 1
        or not inverse_penalty > 0
    ):
        raise ResultError(
            f"ks {list(ks)}, {seeds} seeds, {shuffles} shuffles, {refits} refits, test_share {test_share}, inverse_penalty "
            f"{inverse_penalty}; expected numbers of 1 or more, 2 refits or more, a share between 0 and 1, and a penalty above 0"
        )
    probes = dictionaries_of(saes, model, site)
    if plain := [probe.name for probe in probes if probe.sae is None]:
        raise ResultError(f"{plain[0]!r} is a set of directions; sparse probing reads the latents of an SAE")
    sets = _sets(labelled, per_class, seed)
    if (mean := probing_summary.MEAN) in sets:
        raise ResultError(
            f"a data set is called {mean!r}, which stands for the mean over data sets; give it another name"
        )
    prompts = {name: labelled_prompts(model, some, max_length=max_length, seed=seed) for name, some in sets.items()}
    settings = {
        "ks": list(ks),
        "seeds": seeds,
        "shuffles": shuffles,
        "refits": refits,
        "per_class": per_class,
        "max_length": max_length,
        "test_share": test_share,
        "inverse_penalty": inverse_penalty,
        "sink_filter": sink_filter or None,
        "seed": seed,
    }
    own = {"saes": {probe.name: probe.provenance() for probe in probes}, **settings}
    hashes = {name: hashed([some.tokens, *parts]) for name, (some, *parts) in prompts.items()}
    identity = run_identity(SparseProbing.NAME, model, hashes, own)
    runner = ProbingRunner(model, sets, probes, settings)
    done = run_units(runner.units(), folder, runner, identity=identity, overwrite=overwrite, progress=progress)
    frames, tokens = [], []
    for name, (some, *_) in prompts.items():
        frames += [_offset(d.frame, len(tokens)) for d in done if d.unit["dataset"] == name]
        tokens += some.tokens
    frame = pd.concat(frames, ignore_index=True)
    order = {probe.name: i for i, probe in enumerate(probes)}
    frame = frame.sort_values("sae", key=lambda s: s.map(order), kind="stable", ignore_index=True)
    texts = {
        name: {**some.provenance(), "tokens": sum(map(len, prompts[name][0].tokens))}
        | {"prompts": len(prompts[name][0].tokens), "prompts_dropped": prompts[name][0].dropped}
        for name, some in sets.items()
    }
    left_out = {f"{d.unit['dataset']}, {own['saes'][d.unit['sae']]['site']}": d.notes["left_out"] for d in done}
    provenance = run_provenance(
        SparseProbing.NAME, model, texts, [probe.site for probe in probes], own | {"left_out": left_out}
    )
    return SparseProbing(
        of_kind(frame, "probe", COLUMNS),
        tokens,
        provenance,
        of_kind(frame, "text", TEXT_COLUMNS),
        of_kind(frame, "draw", DRAW_COLUMNS),
    )


def _sets(labelled: Any, per_class: int | None, seed: int) -> dict[str, Labelled]:
    some = [labelled] if isinstance(labelled, Labelled | str) else list(labelled)
    read = [load_labelled(x, per_class=per_class, seed=seed) if isinstance(x, str) else x for x in some]
    names = [x.name for x in read]
    if not names or len(set(names)) < len(names):
        raise ResultError(f"sets of labelled texts {names}; give at least one, each once")
    return dict(zip(names, read, strict=True))


def _offset(frame: pd.DataFrame, by: int) -> pd.DataFrame:
    """Texts and groups counted through all data sets."""
    return frame.assign(**{name: frame[name] + by for name in ("text", "group")})
