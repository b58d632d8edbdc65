"""Feature ablations as text."""

from typing import TYPE_CHECKING, Any, cast

import pandas as pd

from diagnostics.equal_effects import EqualEffect
from interventions.labelled import UNSPLIT

if TYPE_CHECKING:
    from diagnostics.feature_ablations import FeatureAblation

NOTE = (
    "95 % delete-one-group jackknife intervals (a group: texts that are alike for another reason than the concept, all on one side of the "
    "split between ranking and measuring; one text each where none are named): intended and collateral effect, over the groups of the texts "
    "that each is measured on; selectivity, with t of the fewer of the two; none below 10 groups. intended, collateral: kl in "
    "nats, logit and probe in logits; ‖Δx‖²: mean over tokens, coherence: ‖ΣΔx‖/Σ‖Δx‖ over a text, both on texts with / without the concept. At equal intended effect: half the median over SAEs of the largest one."
)


def terminal(result: "FeatureAblation") -> str:
    """Means over concepts by N of the selected latents and their floors, and SAEs at equal intended effect."""
    parts = []
    for title, some in tables(result).items():
        parts += [f"{title}:", "no selected arm, so none" if some.empty else some.to_string(index=False)]
    return "\n".join([*parts, NOTE, *left_out(result.provenance)])


def tables(result: "FeatureAblation") -> dict[str, pd.DataFrame]:
    """Of each form: means over concepts by N, and SAEs at equal intended effect (empty without a selected arm)."""
    found = {}
    for form in result.forms:
        found[f"{form}, mean over concepts"] = _means(result, form)
        found[f"{form}, at equal intended effect"] = equal_frame(result, form)
    return found


def _means(result: "FeatureAblation", form: str) -> pd.DataFrame:
    means = result.frame.groupby(["sae", "ranking", "arm", "count", "own"])[["delta_square", "coherence"]].mean()
    doses: dict[str, dict[Any, float]] = cast(pd.DataFrame, means).to_dict()
    lines = []
    for c in result.means(form):
        for k, n in enumerate(c.counts.tolist()):
            line: dict[str, Any] = {"sae": c.sae, "ranking": c.ranking, "arm": c.arm, "N": n}
            line |= {"intended": str(c.estimate(k, 0)), "collateral": str(c.estimate(k, 1))}
            line |= {"selectivity": "" if c.arm == "keep" else str(c.selectivity(k))}
            for name, column in (("‖Δx‖²", "delta_square"), ("coherence", "coherence")):
                both = [doses[column][c.sae, c.ranking, c.arm, n, own] for own in (True, False)]
                line[name] = " / ".join(f"{value:.3g}" for value in both)
            lines.append(line)
    return pd.DataFrame(lines)


def equal_frame(result: "FeatureAblation", form: str) -> pd.DataFrame:
    """A line for each SAE × concept × arm."""
    return pd.DataFrame([_line(e) for e in result.equal_effects(form)])


def _line(e: EqualEffect) -> dict[str, Any]:
    said = {"sae": e.sae, "data": e.data, "concept": e.concept, "arm": e.arm, "ranking": e.ranking}
    return said | {
        "intended": f"{e.level:.3g}",
        "N": f"{e.count:.3g}",
        "collateral": "" if e.collateral is None else str(e.collateral),
        "selectivity": "" if e.selectivity is None else str(e.selectivity),
        "status": e.status,
    }


def measured(found: dict[str, Any]) -> str:
    """How many texts of a data set measure, in how many groups where it has groups, and which classes it lacks; of its provenance."""
    texts, groups = (found["measured"][what] for what in ("texts", "groups"))
    said = f"{texts} texts measured{f' in {groups} groups' * (groups < texts)}, {len(found['concepts'])} concepts"
    return said + "".join(f" (without {why})" for why in found.get("dropped", {}) if why.endswith(UNSPLIT))


def left_out(provenance: dict[str, Any]) -> list[str]:
    """What was measured on, what the reader must know is missing, and what served instead of the blocks above; a line each."""
    said = [f"{name}: {measured(found)}" for name, found in provenance["texts"].items()]
    said += [f"{n} {reason}" for reason, n in provenance["dropped"].items()]
    said += [f"full forward passes: {why}" for why in provenance["why_hooks"] or ()]
    return [*said, f"{provenance['texts_untouched']} (edit, text) pairs in which nothing fired: no effect, and no pass"]
