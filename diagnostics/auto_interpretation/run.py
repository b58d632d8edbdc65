"""`autointerp`: can a judge who sees a latent's examples tell where it fires?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from diagnostics.auto_interpretation.judges import BASELINE, Judge, token_frequency
from diagnostics.auto_interpretation.result import AutoInterp
from diagnostics.auto_interpretation.summary import latents_frame
from diagnostics.auto_interpretation.work import EXPLANATIONS, SNIPPETS, JudgingRunner, JudgingSettings, joined
from diagnostics.latent_edits.items import asked_latents, check_numbers
from diagnostics.results.calls import recorded
from diagnostics.running.place import placed_at
from diagnostics.running.provenance import run_identity, run_provenance
from diagnostics.running.units import Units, narrowed
from diagnostics.statistics.tables import one_table
from interventions.errors import ResultError
from interventions.models.wrapping import wrap
from interventions.progress import Progressing, followed
from interventions.texts.prompts import Prompts, prompts_for
from sae_models.dictionaries import dictionaries_of


@recorded
@torch.no_grad()
def autointerp(
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    saes: Any,
    *,
    judge: Judge | None = None,
    judge_name: str | None = None,
    latents: int | Sequence[int] = 40,
    top: int = 10,
    more: int = 5,
    snippets: int = 10,
    width: int = 21,
    min_active: int = 10,
    test_share: float = 0.5,
    sink_filter: float | None = 10.0,
    seed: int = 0,
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> AutoInterp:
    """Detection: a judge explains a latent from its examples, then says of held-out snippets in which of them it is active.

        AUC = P(score of an active snippet > score of another) + ½ P(equal);   balanced accuracy: score ≥ ½ says active

    judge: see `Judge`; None: the token-frequency baseline alone (`token_frequency`), which stands beside every other judge too.
    judge_name: under which its answers are kept (default: its command or qualified name); give a judge that changed another name.
    Control: the same snippets with the explanation of another latent of the SAE.

    saes: an SAE, or several by name, each at its own site. latents: how many (latent, polarity) of each, in equal numbers from bins of log
    frequency, or which. Examples come from the fitting prompts: the `top` of largest |z|, one of a prompt, and `more` with weights
    |z|. snippets: held out, of each class: active at the middle, from quarters of |z|; or active nowhere, about tokens at which
    latents of like density are active (`Snippets.held_out`). width: tokens of an example or snippet. min_active: active fitting tokens
    that a latent needs. test_share: prompts held out, by seeded hash. In `folder` each latent is kept as it is done: a judge that
    fails costs none of them.

    Raises `BelongingError`, `SiteError` for an SAE of another width, model or site; `ResultError` for invalid settings, latents that are
    too rare, a judge that fails. Source: detection of arXiv:2410.13928 and arXiv:2503.09532, whose score is the accuracy on 14 snippets, 10
    of them drawn at random; classes of equal size, like density, AUC, controls and intervals are ours.
    """
    model = wrap(model)
    prompts = prompts_for(model, prompts)
    check_numbers(top=top, snippets=snippets, width=width, min_active=min_active)
    check_numbers(0, more=more)
    asked = asked_latents(latents)
    dictionaries = dictionaries_of(saes, model, None)
    if plain := [d.name for d in dictionaries if d.sae is None]:
        raise ResultError(f"{plain[0]!r} are directions; this needs SAEs, which say where latents are active")
    judges: dict[str, Judge] = {BASELINE: token_frequency}
    if judge is not None:
        name = judge_name or getattr(judge, "command", None) or getattr(judge, "__qualname__", type(judge).__qualname__)
        if name == BASELINE:
            raise ResultError(f"a judge called {name!r}, the name of the baseline; give another judge_name")
        judges[name] = judge
    settings = JudgingSettings(top, more, snippets, width, min_active, test_share, sink_filter or None, seed)
    runner = JudgingRunner(model, prompts, dictionaries, asked, settings, judges)
    own = {
        "saes": {d.name: d.provenance() for d in dictionaries},
        "latents": asked,
        "judges": list(judges),
        **vars(settings),
    }
    identity = run_identity(AutoInterp.NAME, model, prompts, own)
    explain, score = runner.units("explain"), runner.units("score")
    with (
        followed(progress, "asking judges", "latent") as told,
        Units(folder, identity, overwrite) as units,
        placed_at(units.place),
    ):
        together = told and (lambda n, _: told(n, len(explain) + len(score)))
        explained = units.run(explain, runner, together)
        for one in explained:
            for judged, text in zip(one.frame["judge"], one.frame["explanation"], strict=True):
                runner.explain(one.unit, judged, text)
        done = units.run(score, runner, together)
    explanations, table = one_table([one.frame for one in explained]), one_table([one.frame for one in done])
    frame = narrowed(latents_frame(table, runner.about()))
    said = own | {"test_prompts": int(runner.test.sum()), "rows": len(frame), **joined(done)}
    provenance = run_provenance(
        AutoInterp.NAME, model, prompts, list(dict.fromkeys(d.site for d in dictionaries)), said
    )
    return AutoInterp(
        frame,
        prompts.tokens,
        provenance,
        pd.DataFrame(table[list(SNIPPETS)]),
        pd.DataFrame(explanations[list(EXPLANATIONS)]),
    )
