"""How an SAE's measures change from one text to another."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray

from diagnostics.sae_evaluation.matched import counterpart, of_differences
from diagnostics.sae_evaluation.measures import MEASURES
from diagnostics.statistics.estimate import Estimate
from diagnostics.statistics.independent import difference_of_independent

SILENT = "silent"
"""Share of latents that fire on none of the first tokens of a text, as many of each text."""


def shifts(
    saes: Mapping[str, Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    deletions: pd.DataFrame,
    latents: pd.DataFrame,
) -> Iterator[dict[str, Any]]:
    """A line for each SAE and text after the first: every measure on that text minus the same on the first text.

        D = m(second) − m(first),      against another SAE: D − D_other

    The texts have prompts of their own, so D's interval is Welch's, from the two delete-one-prompt jackknife errors
    (`difference_of_independent`). Against another SAE of the site (`against`, see `counterpart`) both errors are those of the
    difference between the SAEs on one text, paired over its prompts. `silent`: share of latents that fire on none of the first
    tokens of a text, as many prompts of each as hold no more tokens than the shorter text has (`silent_tokens`); its jackknife
    moves only by latents that fire in a single prompt. Units: those of the measures. Source: ours.

    groups: a line for each SAE and corpus over all counted tokens. deletions, latents: of `SAEEvaluation`.
    """
    corpora = list(dict.fromkeys(g["corpus"] for g in groups))
    of = {(g["sae"], g["corpus"]): g for g in groups}
    without, fires = (dict(iter(some.groupby(["sae", "corpus"], sort=False))) for some in (deletions, latents))
    for corpus in corpora[1:]:
        texts, known = (corpora[0], corpus), {}
        for name in saes:
            tables = [without[name, text] for text in texts]
            least = min(int(some["n_tokens"].sum()) for some in tables)
            for text, some in zip(texts, tables, strict=True):
                found = {
                    m: _Deleted(of[name, text][m], some[m].to_numpy(float), some["n_tokens"].to_numpy())
                    for m in MEASURES
                }
                known[name, text] = found | {SILENT: _silent(some, fires[name, text], least)}
        for name in saes:
            for against in filter(lambda other: other is not None, ("", counterpart(name, saes))):
                line = {key: of[name, corpus][key] for key in ("sae", "site", "layer", "point")}
                line |= {"first": texts[0], "second": corpus, "against": against}
                line["silent_tokens"] = [known[name, text][SILENT].estimate.n_rows for text in texts]
                for m in (*MEASURES, SILENT):
                    own = [known[name, text][m] for text in texts]
                    sides = [one.estimate for one in own]
                    if against:
                        sides = [one.minus(known[against, text][m]) for one, text in zip(own, texts, strict=True)]
                    line[m] = difference_of_independent(*sides)
                yield line


class _Deleted(NamedTuple):
    """A statistic of one SAE on one text, and without each prompt."""

    estimate: Estimate
    without: Float[ndarray, "prompt"]
    sizes: Int[ndarray, "prompt"]
    """tokens of each"""

    def minus(self, other: "_Deleted") -> Estimate:
        """The difference on the same prompts."""
        values = np.r_[self.estimate.value - other.estimate.value, self.without - other.without]
        n = min(self.estimate.n_prompts, other.estimate.n_prompts)
        return replace(of_differences(values, n, self.sizes), n_rows=self.estimate.n_rows)


def _silent(prompts: pd.DataFrame, latents: pd.DataFrame, n_tokens: int) -> _Deleted:
    """The share of latents that fire in none of the first prompts that together hold at most `n_tokens` counted tokens."""
    size = prompts["n_tokens"].to_numpy()
    n = int(np.searchsorted(size.cumsum(), n_tokens, side="right"))
    number = prompts["prompt"].to_numpy()[:n]
    last = number[-1] if n else -1
    first, second = (latents[f"{which}_prompt"].to_numpy() for which in ("first", "second"))
    fires = (first >= 0) & (first <= last)
    alone = fires & ((second < 0) | (second > last))
    share = float(1 - fires.mean())
    without = share + np.bincount(first[alone], minlength=last + 1)[number] / len(first)
    return _Deleted(of_differences(np.r_[share, without], n, size[:n]), without, size[:n])
