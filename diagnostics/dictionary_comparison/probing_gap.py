"""Labelled texts of a comparison of dictionaries: checks, and the split of the probing gap on them."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray
from transformers import PreTrainedTokenizerBase

from diagnostics.dictionary_comparison.choices import FOLDS
from diagnostics.dictionary_comparison.discovery import discovery_split
from diagnostics.dictionary_comparison.quartiles import Sample
from diagnostics.statistics.tables import few_prompts
from interventions.errors import ResultError
from interventions.texts.prompts import Prompts, as_prompts
from sae_models.active_latents import active_latents
from sae_models.dictionaries import Dictionary


@dataclass(frozen=True)
class LabelledTexts:
    """Texts of two classes or more."""

    name: str
    """of the data set"""
    prompts: Prompts
    labels: list[str]
    """the class of each"""
    groups: list[str]
    """the group of each, which is held out and deleted as a whole; each text its own where none are given"""

    @classmethod
    def of(
        cls,
        name: str,
        given: Sequence[Any],
        tokenizer: PreTrainedTokenizerBase | None,
        skip_first: int | None,
    ) -> "LabelledTexts":
        """From (texts, labels) or (texts, labels, groups); texts in any form that prompts may have.

        skip_first: number of first tokens of each text that are left out, with special tokens (None: neither). Raises `TextError`;
        `ResultError` where labels or groups do not match the texts, for fewer than two classes, a class with fewer texts, or groups,
        than folds, and where no token is left.
        """
        texts, labels, *groups = given
        prompts, labels = as_prompts(texts, tokenizer), [str(label) for label in labels]
        n = len(prompts.tokens)
        groups = [str(group) for group in groups[0]] if groups else [str(i) for i in range(n)]
        if not len(labels) == len(groups) == n:
            raise ResultError(
                f"labelled texts {name!r}: {len(labels)} labels and {len(groups)} groups for {n} texts; give each text one, in their order"
            )
        if why := _too_few(labels, groups):
            raise ResultError(f"labelled texts {name!r}: {why}; give more texts, or leave the class out")
        if skip_first is not None and all(all(special[skip_first:]) for special in prompts.special):
            raise ResultError(
                f"labelled texts {name!r}: no token of {n} texts is left without the first {skip_first} and special ones; "
                "give longer texts, or skip fewer"
            )
        return cls(name, prompts, labels, groups)

    def provenance(self) -> dict[str, Any]:
        """Where the texts come from, texts and groups of each class, and a hash of labels and groups in the order of the texts."""
        digest = hashlib.sha256(json.dumps([self.labels, self.groups]).encode()).hexdigest()
        counts, groups = (
            dict(sorted(some.items())) for some in (Counter(self.labels), _groups(self.labels, self.groups))
        )
        own = {"texts": len(self.labels), "counts": counts, "groups": groups, "labels_sha256": digest}
        return self.prompts.provenance | own


def _groups(labels: Sequence[str], groups: Sequence[str]) -> Counter[str]:
    """How many groups have texts of each class."""
    return Counter(label for label, _ in set(zip(labels, groups, strict=True)))


def _too_few(labels: Sequence[str], groups: Sequence[str]) -> str | None:
    """Why no probe can be fitted and tested on texts of these classes; None if one can."""
    counts = _groups(labels, groups)
    if len(counts) < 2:
        return f"{len(counts)} class ({', '.join(counts)}), where a probe needs two"
    name = min(sorted(counts), key=lambda label: counts[label])
    what = "texts" if len(set(groups)) == len(groups) else "groups of texts"
    return f"class {name!r} has {counts[name]} {what}, and {FOLDS} folds need {FOLDS}" if counts[name] < FOLDS else None


@few_prompts()
def gap_lines(
    texts: LabelledTexts,
    dictionaries: Mapping[str, Dictionary],
    sample: Sample,
    matches: Mapping[tuple[str, str], ndarray],
    seed: int,
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """The texts that count, and a line with the `discovery_split` of each pair of dictionaries.

    sample: the tokens that count, of these texts. matches: (latent, latent) of each pair of SAEs. A line says in `why_not` why it has
    no accuracies: no latents are matched, or the filters of tokens left too few texts of a class.
    """
    kept = np.unique(sample.prompt)
    labels, groups = ([some[i] for i in kept] for some in (texts.labels, texts.groups))
    too_few = _too_few(labels, groups)
    means = {} if too_few else {n: _pooled(d, sample, len(texts.labels))[kept] for n, d in dictionaries.items()}
    lines = []
    for (a, b), pairs in matches.items():
        why = None if len(pairs) else "no latents are matched"
        why = f"of texts with a token that counts, {too_few}" if too_few else why
        line: dict[str, Any] = {"data": texts.name, "sae": a, "other": b, "matches": len(pairs), "why_not": why}
        if why is None:
            line |= discovery_split(means[a], means[b], pairs, labels, groups=groups, folds=FOLDS, seed=seed).as_dict()
        lines.append(line)
    return pd.DataFrame({"text": kept}), lines


def _pooled(dictionary: Dictionary, sample: Sample, n_texts: int) -> Float[ndarray, "text latent"]:
    """Mean of each latent over the tokens of each text."""
    assert dictionary.sae is not None
    z = active_latents(dictionary.sae, sample.x)
    count = np.maximum(np.bincount(sample.prompt, minlength=n_texts), 1)
    total = np.bincount(sample.prompt[z.token] * z.d_sae + z.latent, z.z, n_texts * z.d_sae)
    return total.reshape(n_texts, z.d_sae) / count[:, None]
