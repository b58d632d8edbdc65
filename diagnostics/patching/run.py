"""`activation_patching`: activations of one prompt put into the run of another, cell by cell, beside matched controls."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diagnostics.pairs.differences import FLOOR
from diagnostics.pairs.pair import Pairs, labels
from diagnostics.pairs.read import pairs_from
from diagnostics.patching.design import settings_of
from diagnostics.patching.result import ActivationPatching
from diagnostics.patching.work import PatchingRunner, merged
from diagnostics.results.calls import recorded
from diagnostics.running.provenance import run_identity, run_provenance
from diagnostics.running.units import run_table
from interventions.direct_logits import token_text
from interventions.models.wrapping import wrap
from interventions.progress import Progressing
from interventions.sites import SiteLike


@recorded
@torch.no_grad()
def activation_patching(
    model: Any,
    pairs: Pairs | str | Path | Sequence[Any],
    *,
    sites: SiteLike | Sequence[SiteLike] = ("z",),
    layers: int | Sequence[int] | None = None,
    positions: str = "each",
    directions: str | Sequence[str] = ("denoise", "noise"),
    metric: str = "logit_difference",
    controls: int = 1,
    scores: str | Sequence[str] = (),
    n: int | None = None,
    floor: float = FLOOR,
    seed: int = 0,
    path: str = "auto",
    batch_rows: int | None = None,
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> ActivationPatching:
    """Put what stands at each cell in one run of a pair into the other run, and measure how far the metric m moves.

        denoise  clean activations into the corrupt run:  effect = m − m_corrupt
        noise    corrupt activations into the clean run:  effect = m_clean − m
        share of a cell = Σ effect / Σ (m_clean − m_corrupt) over pairs

    pairs: a task (`ioi`, `agreement`, `capitals`, `greater_than`, `pronouns`), a CSV, or a list, as `pairs_from` takes them; n: how
    many (default: 100 of a task, all of others); floor: pairs with a smaller |m_clean − m_corrupt|, in logits, are left out and
    counted. sites: points (`z`, `q`, `k`, `v`, `pattern`, `neurons`, and those of the stream)
    at every block of `layers`, or sites; of q, k, v, pattern and z each head is a cell. positions: `each` is a cell of its own, or
    `all` differing ones at once. metric: `logit_difference` (right − wrong) or `probability` of the right answer, at the last
    position. controls: how many times each cell is also moved as far along the difference of two other pairs' clean activations
    at the same site, head and label. scores: estimates beside the exact effect, `gradient`, `ig5`, `ig20`, `dla` (see `scores`).
    Cells before the first differing token are 0 exactly: they are filled in and not run. seed: of drawn pairs and controls.
    folder: where finished units, four pairs each, are kept, so that the same call goes on from there.

    Source: activation patching as in arXiv:2202.05262 and arXiv:2309.16042; controls, intervals and both directions are ours.
    Raises `TextError` for pairs that cannot be used, `SiteError` for a site or head that the model lacks, `ResultError` for
    other settings.
    """
    model = wrap(model)
    asked = {"positions": positions, "metric": metric, "controls": controls, "scores": tuple(scores), "seed": seed}
    settings = settings_of(model, sites, layers, directions, path=path, batch_rows=batch_rows, **asked)
    chosen = pairs_from(model, pairs, n=n, seed=seed, floor=floor)
    runner = PatchingRunner(model, chosen, settings)
    own = {name: value for name, value in settings.as_dict().items() if name not in ("sites", "path", "batch_rows")}
    hashes = {"pairs": chosen.sha256}
    identity = run_identity(
        ActivationPatching.NAME,
        model,
        hashes,
        {**own, "sites": [str(s) for s in settings.sites], "path": path, "batch_rows": batch_rows},
    )
    frame, notes = run_table(
        runner.units(), folder, runner, merged, identity=identity, overwrite=overwrite, progress=progress
    )
    answers = [[pair.right, pair.wrong] for pair in chosen]
    provenance = run_provenance(
        ActivationPatching.NAME, model, {"pairs": chosen.description}, settings.sites,
        own | {"answers": answers, "pools": list(dict.fromkeys(chosen.pools)), "words": _words(chosen, model.tokenizer), "rows": len(frame), "rows_run": int(frame["run"].sum()), "pairs_dropped": dict(chosen.left_out), **notes},
    )  # fmt: skip
    return ActivationPatching(frame, chosen.clean + chosen.corrupt, provenance)


def _words(pairs: Pairs, tokenizer: Any) -> list[dict[str, str]]:
    """Of each pool, what stands at a position without a role where all its pairs agree: `store`, or clean/corrupt, `John/Mary`."""
    found: dict[str, dict[str, set[str]]] = {}
    for pair in pairs:
        own = found.setdefault(pair.pool, {})
        for label, *tokens in zip(labels(pair), pair.clean, pair.corrupt, strict=True):
            if label.isdigit():
                texts = dict.fromkeys(token_text(token, tokenizer).strip() for token in tokens)
                own.setdefault(label, set()).add("/".join(texts))
    return [{label: min(some) for label, some in own.items() if len(some) == 1} for own in found.values()]
