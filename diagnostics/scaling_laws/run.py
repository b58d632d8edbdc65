"""`sae_scaling_laws`: the joint law of a grid of SAEs, the largest width predicted, downstream loss as equivalent compute."""

from typing import Any

import numpy as np
import pandas as pd
import torch

from diagnostics.results.calls import recorded
from diagnostics.running.notes import how_measured, noted
from diagnostics.running.provenance import run_provenance
from diagnostics.sampling.counted import Tokens
from diagnostics.sampling.tokens import generator
from diagnostics.scaling_laws.laws import law_rows
from diagnostics.scaling_laws.result import ScalingLaws
from diagnostics.scaling_laws.summary import Measured, described
from diagnostics.scaling_laws.work import early_exits, prompt_sums, shares_of_compute
from interventions.errors import ResultError
from interventions.models.wrapping import wrap
from interventions.progress import Progressing, followed
from interventions.recording import record
from interventions.sites import Site
from interventions.texts.prompts import Prompts, prompts_for
from sae_models.belonging import sae_site
from sae_models.dictionaries import by_name
from sae_models.live import as_sae
from sae_models.sae import SAE


@recorded
@torch.no_grad()
def sae_scaling_laws(
    model: Any,
    prompts: Prompts | list[list[int]] | list[str],
    saes: Any,
    *,
    splice_prompts: int | None = 50,
    exits: bool = True,
    draws: int = 300,
    sink_filter: float | None = 10.0,
    skip_first: int = 1,
    path: str = "auto",
    seed: int = 0,
    progress: Progressing = None,
) -> ScalingLaws:
    """The law L(n, k) of the normalised MSE of SAEs of one site, trained on one stream, that differ in width n and active latents k.

        L(n, k) = exp(α + β_k log k + β_n log n + γ log k log n) + exp(ζ + η log k)

    saes: by name, as `train_saes` or `mechdiag train-sae` trained them; recipes say what differs. Fitted are those of the recipe that
    most share, the lowest seed of each width and k; others are compared with them at their width and k, paired by seed. The largest
    width is also predicted from the others. prompts: held-out text.

    Downstream: KL and cross-entropy with each SAE's output in place of the activation on the first `splice_prompts` (None: all), the
    sinks left as they are; also as the compute of the model's own early exit with that cross-entropy (exits). That is the only
    ladder of smaller models at hand. Exits that were trained would do better at the same compute, so this is an upper bound of the
    share of compute. draws: refits of each form and interval. sink_filter, skip_first, path: as in `evaluate_saes`.

    Source: arXiv:2406.04093 for the law; held-out prediction, intervals and the ladder are ours. Raises `ResultError` for SAEs of several sites or streams, fewer
    than two widths, and settings out of range; `BelongingError` for an SAE of another model. A form that the grid does not determine
    is no error: its line says so.
    """
    model = wrap(model)
    text = prompts_for(model, prompts)
    named: dict[str, SAE] = {name: as_sae(sae) for name, sae in by_name(saes).items()}
    if draws < 0 or seed < 0 or (splice_prompts is not None and splice_prompts < 1) or (sink_filter or 0) < 0:
        raise ResultError(
            f"draws {draws}, seed {seed}, splice_prompts {splice_prompts}, sink_filter {sink_filter}; expected 0 or more, and at least "
            "one prompt"
        )
    sites = {name: sae_site(sae, model) for name, sae in named.items()}
    said = {name: _described(sae, sites[name]) for name, sae in named.items()}
    runs = pd.DataFrame(described(said))
    if runs["d_sae"].nunique() < 2:
        raise ResultError(f"{len(runs)} SAEs of one width, {runs['d_sae'][0]}; give two widths or more")
    site = next(iter(sites.values()))
    n_spliced = min(splice_prompts or len(text.tokens), len(text.tokens))
    steps = n_spliced * (len(named) + 1) + (model.n_layers * n_spliced if exits else 0)
    with followed(progress, "splicing", "prompt") as told:
        tick = lambda n: told(n, steps) if told is not None else None  # noqa: E731
        recording = record(model, text.tokens, (site,), keep_cache=False)
        tokens = Tokens(recording, site, text.special, sink_filter or None, skip_first)
        frame, sums, kinds, usable, spliced = prompt_sums(tokens, named, n_spliced, path, tick)
        ladder = pd.DataFrame(columns=["layer", "prompt", "n", "ce", "share"])
        if exits:
            ladder = early_exits(model, tokens, usable, tick)
            ladder["share"] = shares_of_compute(model)[ladder["layer"].to_numpy(int)]
    runs = runs.merge(kinds, on="sae")
    measured = Measured(runs, frame, sums, ladder)
    cells = measured.cells()
    stream = np.random.default_rng(generator(seed, "scaling laws").initial_seed())
    n, k = (runs[name].to_numpy(float)[cells] for name in ("d_sae", "k"))
    fits = law_rows(n, k, measured.losses(cells), len(sums), draws, stream)
    notes: dict[str, Any] = {}
    noted(notes, spliced)
    how = how_measured([(str(site), notes)])
    own = {
        "saes": said,
        "sink_filter": sink_filter or None,
        "skip_first": skip_first,
        "splice_prompts": splice_prompts,
        "draws": draws,
        "seed": seed,
        "rows": len(frame),
        "left_out": {"text": {str(site): _left_out(tokens, sums, n_spliced)}},
        "path": how["path"],
        "why_hooks": how["why_hooks"],
        "path_delta": how["replay_delta"],
        "exits_notes": _exits_notes(measured) if exits else [],
    }
    provenance = run_provenance(ScalingLaws.NAME, model, text, [site], own)
    return ScalingLaws(frame, text.tokens, provenance, runs, sums, ladder, fits)


def _exits_notes(m: Measured) -> list[str]:
    """Where the ladder of exits does not serve as one."""
    one = np.ones((1, len(m.text)))
    rungs = m.ladder(one)[0]
    ces = np.array([m.of("excess_ce", i, one)[0] for i in range(len(m.runs))]) + float(rungs[-1])
    found = []
    if worse := int((np.diff(rungs) > 0).sum()):
        found.append(
            f"{worse} of {len(rungs) - 1} blocks raise the cross-entropy of an exit; the best exit so far counts"
        )
    if above := int((ces > rungs[0]).sum()):
        found.append(f"{above} of {len(ces)} SAEs are worse than the first exit and have no equivalent")
    if not ((rungs > ces.min()) & (rungs < ces.max())).any():
        found.append("no exit lies between the SAEs: all of them fall on one segment of the ladder")
    return found


def _left_out(tokens: Tokens, sums: pd.DataFrame, n_spliced: int) -> dict[str, int]:
    counted = int(sums["n_tokens"][:n_spliced].sum())
    return {**tokens.left_out, "spliced: last tokens, and not finite": counted - int(sums["n_spliced"].sum())}


def _described(sae: SAE, site: Site) -> dict[str, Any]:
    return {
        "site": str(site),
        "d_sae": sae.d_sae,
        "score": sae.score.kind,
        "selector": sae.selector.settings(),
        "normalise": sae.normalise.settings(),
        "model_name": sae.model_name,
        "metadata": sae.metadata,
    }
