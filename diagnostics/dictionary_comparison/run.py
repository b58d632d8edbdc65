"""`compare_dictionaries`: the latents that dictionaries of one site share, and how stable they are over training seeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from diagnostics.dictionary_comparison.matching import HUNGARIAN_LIMIT
from diagnostics.dictionary_comparison.probing_gap import LabelledTexts
from diagnostics.dictionary_comparison.result import DictionaryComparison
from diagnostics.dictionary_comparison.summary import alignment_lines, joined_latents, seed_groups, seed_lines
from diagnostics.dictionary_comparison.work import Comparison, ComparisonPlan
from diagnostics.results.calls import recorded
from diagnostics.running.provenance import run_identity, run_provenance
from diagnostics.running.units import Unit, UnitResult, Units
from diagnostics.statistics.tables import one_table
from interventions.errors import ResultError
from interventions.models.causal_model import CausalModel
from interventions.models.wrapping import wrap
from interventions.progress import Progressing, followed
from interventions.texts.prompts import Prompts, prompts_for
from sae_models.dictionaries import Dictionary, by_name, dictionaries_of
from sae_models.sae import SAE


@recorded
def compare_dictionaries(
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    saes: Any,
    *,
    labelled: Mapping[str, Sequence[Any]] | None = None,
    correlation: float = 0.7,
    cosine: float = 0.7,
    duplicate_cosine: float = 0.9,
    min_active: int = 10,
    min_quartile: int = 5,
    hungarian_limit: int = HUNGARIAN_LIMIT,
    causal_latents: int = 0,
    causal_tokens: int = 10,
    sink_filter: float | None = 10.0,
    skip_first: int = 1,
    seed: int = 0,
    path: str = "auto",
    batch_rows: int | None = None,
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> DictionaryComparison:
    """Compare two or more SAEs of one site on one text.

        matched   correlation of activations ≥ `correlation` and cosine of decoder rows > `cosine`, one to one
        MCS       max over the other's decoder rows of the cosine with d_i

    saes: anything that `as_sae` takes, by name. labelled: by name (texts, labels) or (texts, labels, groups), texts being anything that
    prompts may be, for the split of the probing gap into discovery and separability; texts of one group are held out together, and of
    each class there must be five groups (without groups: texts) or more. duplicate_cosine: near-duplicates
    within an SAE lie above. min_active: latents active on fewer tokens are not matched, but counted. min_quartile: active tokens that
    a latent needs in the first and in the fourth quartile of ‖x‖ for its gradient ratio. hungarian_limit: see `matched`.
    causal_latents: of each SAE so many are ablated at up to `causal_tokens` tokens each where they are active (0: none), from bins of
    log frequency; correlations weight them by how many they stand for. sink_filter, skip_first: tokens left out, as in
    `evaluate_saes`; everything is counted on the others. Other arguments as in `direction_norm`.

    Chance levels: matched share with one SAE's activations on the tokens of other prompts (the token axis turned by half);
    MCS with random rows, isotropic and with the other's covariance. Intervals, where there are any, are over prompts; a
    dictionary's latents are no sample, and MCS is given with its quantiles over latents. Training seeds are points.
    Raises `BelongingError` or `SiteError` for SAEs of another model or width, `ResultError` for fewer than two, SAEs of different
    sites, settings out of range, labels that do not fit their texts, and classes of too few. Source: arXiv:2606.15054
    (thresholds, quartiles, ratio, split), arXiv:2605.18629 (MCS, alignment); one-to-one matching, chance levels and intervals are ours.
    """
    model = wrap(model)
    plan = ComparisonPlan(
        correlation, cosine, duplicate_cosine, min_active, min_quartile, hungarian_limit, causal_latents, causal_tokens,
        sink_filter or None, skip_first, seed,
    )  # fmt: skip
    saes = by_name(saes)
    plan.check(len(saes))
    dictionaries = dictionaries_of(saes, model, None)
    if len(sites := {str(d.site) for d in dictionaries}) > 1:
        raise ResultError(
            f"SAEs of {', '.join(sorted(sites))}; dictionaries are compared at one site: give those of one"
        )
    prompts = prompts_for(model, prompts)
    skipped = plan.skip_first if plan.sink_filter else None
    texts = {name: LabelledTexts.of(name, some, model.tokenizer, skipped) for name, some in (labelled or {}).items()}
    own = {
        "saes": {d.name: d.provenance() for d in dictionaries},
        **asdict(plan),
        "labelled": {name: some.provenance() for name, some in texts.items()},
    }
    how = {"path": path, "batch_rows": batch_rows}
    work = Comparison(model, prompts, dictionaries, texts, plan, how)
    identity = run_identity(DictionaryComparison.NAME, model, prompts, own | how)
    with (
        followed(progress, DictionaryComparison.NAME, "unit") as told,
        Units(folder, identity, overwrite) as units,
    ):
        last = [Unit.of(part="discovery", data=name) for name in texts]  # they need what the others find
        together = told and _Together(told, len(work.units()) + len(last))
        done = units.run(work.units(), work, together)
        for pair in _of(done, "pair"):
            matches = np.array(pair.notes["matches"], dtype=int).reshape(-1, 2)
            work.matches[pair.unit["sae"], pair.unit["other"]] = matches
        if texts:
            done += units.run(last, work, together)
    return _assembled(done, model, prompts, dictionaries, own)


class _Together:
    """Progress of units that run one part after the other, as of one run."""

    def __init__(self, progress: Callable[[int, int], object], total: int):
        self.progress, self.total = progress, total

    def __call__(self, n: int, _: int) -> None:
        self.progress(n, self.total)

    def initial(self, n: int, _: int) -> None:
        getattr(self.progress, "initial", self.progress)(n, self.total)


def _of(done: Sequence[UnitResult], part: str) -> list[UnitResult]:
    return [one for one in done if one.unit["part"] == part]


def _table(done: Sequence[UnitResult], part: str) -> pd.DataFrame:
    """The tables of the units of one part as one."""
    return one_table([one.frame for one in _of(done, part)])


def _assembled(
    done: Sequence[UnitResult],
    model: CausalModel,
    prompts: Prompts,
    dictionaries: list[Dictionary],
    own: dict[str, Any],
) -> DictionaryComparison:
    latents, partners = _table(done, "latents"), _table(done, "pair")
    duplicates, rows = _table(done, "duplicates"), _table(done, "ablations")
    order = [d.name for d in dictionaries]
    groups = seed_groups({d.name: cast(SAE, d.sae) for d in dictionaries})
    frame = joined_latents(latents, partners, duplicates, rows, groups)
    pairs = [line for one in _of(done, "pair") for line in one.notes["lines"]]
    pairs.sort(key=lambda line: (order.index(line["sae"]), order.index(line["other"])))
    own_lines = [one.notes["line"] for one in _of(done, "latents")]
    lines = {
        "saes": [line | {"near_duplicates": int((duplicates["sae"] == line["sae"]).sum())} for line in own_lines],
        "pairs": pairs,
        "seeds": seed_lines(groups, pairs),
        "alignment": alignment_lines(frame, rows, groups),
        "discovery": [line for one in _of(done, "discovery") for line in one.notes["lines"]],
    }
    ablated = {one.unit["sae"]: one.notes for one in _of(done, "ablations")}
    said = {
        **own,
        "site": str(dictionaries[0].site),
        "seed_groups": groups,
        **_of(done, "latents")[0].notes["tokens"],
        "null_own_prompt": max(one.notes["null_own_prompt"] for one in _of(done, "pair")),
        "labelled_tokens": {one.unit["data"]: one.notes["tokens"] for one in _of(done, "discovery")},
        "ablations": ablated,
    }
    provenance = run_provenance(DictionaryComparison.NAME, model, prompts, [dictionaries[0].site], said)
    return DictionaryComparison(frame, prompts.tokens, provenance, partners, duplicates, rows, lines)
