"""Feature ablations as text."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pandas as pd

from diagnostics.ablation_curves import Curve
from diagnostics.equal_effects import EqualEffect
from interventions.labelled import UNSPLIT

NOTE = (
    "95 % delete-one-group jackknife intervals (a group: texts that are alike for another reason than the concept, all on one side of the "
    "split between ranking and measuring; one text each where none are named): intended and collateral effect, over the groups of the texts "
    "that each is measured on; selectivity, with t of the fewer of the two; none below 10 groups. intended, collateral: kl in "
    "nats, logit and probe in logits; ‖Δx‖²: mean over tokens, coherence: ‖ΣΔx‖/Σ‖Δx‖ over a text, both on texts with / without the concept. At equal intended effect: half the median over SAEs of the largest one."
)


def tables(
    frame: pd.DataFrame, by_form: Mapping[str, tuple[Sequence[Curve], Sequence[EqualEffect]]]
) -> dict[str, pd.DataFrame]:
    """Of each form: means over concepts by N, and SAEs at equal intended effect (empty without a selected arm)."""
    found = {}
    for form, (means, equal) in by_form.items():
        found[f"{form}, mean over concepts"] = _means(frame, means)
        found[f"{form}, at equal intended effect"] = pd.DataFrame([_line(e) for e in equal])
    return found


def _means(frame: pd.DataFrame, curves: Sequence[Curve]) -> pd.DataFrame:
    means = frame.groupby(["sae", "ranking", "arm", "count", "own"])[["delta_square", "coherence"]].mean()
    doses: dict[str, dict[Any, float]] = cast(pd.DataFrame, means).to_dict()
    lines = []
    for c in curves:
        for k, n in enumerate(c.counts.tolist()):
            line: dict[str, Any] = {"sae": c.sae, "ranking": c.ranking, "arm": c.arm, "N": n}
            line |= {"intended": c.estimate(k, 0), "collateral": c.estimate(k, 1)}
            line |= {"selectivity": "" if c.arm == "keep" else c.selectivity(k)}
            for name, column in (("‖Δx‖²", "delta_square"), ("coherence", "coherence")):
                both = [doses[column][c.sae, c.ranking, c.arm, n, own] for own in (True, False)]
                line[name] = " / ".join(f"{value:.3g}" for value in both)
            lines.append(line)
    return pd.DataFrame(lines)


def _line(e: EqualEffect) -> dict[str, Any]:
    said = {"sae": e.sae, "data": e.data, "concept": e.concept, "arm": e.arm, "ranking": e.ranking}
    return said | {
        "intended": e.level,
        "N": e.count,
        "collateral": "" if e.collateral is None else e.collateral,
        "selectivity": "" if e.selectivity is None else e.selectivity,
        "status": e.status,
    }


def measured(found: dict[str, Any]) -> str:
    """How many texts of a data set measure, in how many groups where it has groups, and which classes it lacks; of its provenance."""
    texts, groups = (found["measured"][what] for what in ("texts", "groups"))
    said = f"{texts} texts measured{f' in {groups} groups' * (groups < texts)}, {len(found['concepts'])} concepts"
    return said + "".join(f" (without {why})" for why in found.get("dropped", {}) if why.endswith(UNSPLIT))
