"""`evaluate_saes`: reconstruction and sparsity of SAEs, the model's loss with them spliced in, alignment."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from diagnostics.results.calls import recorded
from diagnostics.running.notes import how_measured, noted
from diagnostics.running.provenance import run_provenance
from diagnostics.sae_evaluation import measures as sae_measures
from diagnostics.sae_evaluation.measures import MEASURES, WithoutEach
from diagnostics.sae_evaluation.result import SAEEvaluation
from diagnostics.sae_evaluation.summary import ENDS
from diagnostics.sampling.counted import QUARTILES, Tokens
from interventions.errors import ResultError
from interventions.models.wrapping import wrap
from interventions.progress import Progressing, followed
from interventions.recording import record
from interventions.sites import Site
from interventions.texts.prompts import Prompts, prompts_for
from sae_models.belonging import sae_site
from sae_models.dictionaries import by_name
from sae_models.live import Wrapped, as_sae
from sae_models.sae import SAE
from sae_models.scores import Cosine


@recorded
@torch.no_grad()
def evaluate_saes(
    model: Any,
    prompts: Mapping[str, Prompts] | Prompts | Sequence[Sequence[int]] | Sequence[str],
    saes: Any,
    *,
    sink_filter: float | None = 10.0,
    skip_first: int = 1,
    splice_prompts: int | None = 50,
    splice_sinks: bool = False,
    path: str = "auto",
    progress: Progressing = None,
) -> SAEEvaluation:
    """Evaluate SAEs, each at its own site of one model, on one text or several: `MEASURES`, by quartile of ‖x‖, and latent by latent.

    prompts: by the name of their corpus, or those of one. saes: anything that `as_sae` takes (ours, live SAELens objects), by
    name; a list is named by what they are. sink_filter: of
    `no sinks`, times the site's median ‖x‖; None or 0: there is only `all`. skip_first: tokens at the beginning of each prompt that
    `no sinks` leaves out as well: at some depths the first is a sink whose norm does not show it. splice_prompts: KL and CE are measured on so many of
    each corpus' prompts, its first (None: all), for each SAE costs a pass through the blocks above; all else is measured on all.
    splice_sinks: in `no sinks` replace the sinks too, uncounted (default: they stay, for later tokens read them). path: as in
    `spliced`. progress: called with steps done and their total.

    Intervals are over prompts. Where SAEs of one architecture and site differ in sparsity, the result compares such families at
    equal L0 and at equal FVE (`matched`); with a second text it has the differences between texts (`shift`). Training seeds are SAEs beside one another: points, never an interval.
    Memory: activations of all sites at all tokens, a few times 2²³ numbers (2²⁶ on a GPU) for latents, and a byte for each prompt
    and latent.
    Raises `BelongingError` or `SiteError` for an SAE of another width, model or site, before anything runs; `ResultError` for
    no SAEs, no text or settings out of range.
    """
    model = wrap(model)
    named: dict[str, SAE] = {name: as_sae(sae) for name, sae in by_name(saes).items()}
    sites = {name: sae_site(sae, model) for name, sae in named.items()}
    texts = {name: prompts_for(model, some) for name, some in _corpora(prompts).items()}
    if (sink_filter or 0) < 0 or (splice_prompts is not None and splice_prompts < 1):
        raise ResultError(
            f"sink filter {sink_filter}, {splice_prompts} spliced prompts; expected 0 or more, and 1 or more"
        )
    by_site = {site: [name for name in named if sites[name] == site] for site in dict.fromkeys(sites.values())}
    steps = [
        min(splice_prompts or len(text.tokens), len(text.tokens)) * (len(names) + 2) * (2 if sink_filter else 1)
        for text in texts.values()
        for names in by_site.values()
    ]
    lines, latents, deletions, left_out, ways = [], [], [], {}, []
    with followed(progress, "splicing", "prompt") as told:
        tick = lambda n: told(n, sum(steps)) if told is not None else None  # noqa: E731
        for corpus, text in texts.items():
            recording = record(model, text.tokens, tuple(by_site), keep_cache=False)
            for site, names in by_site.items():
                tokens = Tokens(recording, site, text.special, sink_filter or None, skip_first)
                some = {name: named[name] for name in names}
                splices = sae_measures.spliced_stream(tokens, some, splice_prompts, splice_sinks, path, tick)
                left_out.setdefault(corpus, {})[str(site)] = _left_out(tokens, splices, names)
                ways.append((str(site), _way(splices)))
                for name, sae in some.items():
                    passed = sae_measures.encoded(sae, tokens)
                    keys = {"sae": name, "site": str(site), "layer": site.layer, "point": site.point, "corpus": corpus}
                    found = list(sae_measures.lines(tokens, passed, splices, name))
                    lines += [keys | _as_row(line) for line in found]
                    deletions.append(_without_each(name, corpus, found, passed, tokens))
                    latents.append(_latents(name, corpus, sae, passed, tokens))
    how = how_measured(ways)
    said = {
        "saes": {name: _described(sae, sites[name]) for name, sae in named.items()},
        "sink_filter": sink_filter or None,
        "skip_first": skip_first,
        "splice_prompts": splice_prompts,
        "splice_sinks": splice_sinks,
        "left_out": left_out,
        "path": how["path"],
        "why_hooks": how["why_hooks"],
        "path_delta": how["replay_delta"],
    }
    read = {
        name: {**text.provenance, "prompts": len(text.tokens), "tokens": sum(map(len, text.tokens))}
        for name, text in texts.items()
    }
    provenance = run_provenance(SAEEvaluation.NAME, model, read, by_site, said)
    every = [tokens for text in texts.values() for tokens in text.tokens]
    order = {name: i for i, name in enumerate(named)}
    frame, table, without = (
        part.sort_values("sae", key=lambda s: s.map(order), kind="stable", ignore_index=True)
        for part in (pd.DataFrame(lines), pd.concat(latents), pd.concat(deletions))
    )
    return SAEEvaluation(frame, every, provenance, table, without)


def _corpora(prompts: Any) -> dict[str, Any]:
    """Prompts by the name of their corpus."""
    named = isinstance(prompts, Mapping) and "input_ids" not in prompts  # else a tokenizer's output
    found = prompts if named else {"given": prompts}
    if isinstance(prompts, Prompts):
        found = {str(prompts.provenance.get("name", "given")): prompts}
    if not found:
        raise ResultError("no text; give at least one")
    return dict(found)


def _as_row(line: dict[str, Any]) -> dict[str, Any]:
    """A line as a row of the table: estimates as four columns each, and what they were counted on once."""
    found = {name: value.estimate() for name, value in line.items() if isinstance(value, WithoutEach)}
    row = {name: value for name, value in line.items() if name not in found}
    for of, name in (("", "fve"), ("kl_", "kl"), ("ce_", "ce")):
        row |= {f"n_{of}tokens": found[name].n_rows, f"n_{of}prompts": found[name].n_prompts}
        row[f"n_{of}effective"] = found[name].n_effective
    for name, estimate in found.items():
        row |= {name: estimate.value, **{f"{name}_{end}": getattr(estimate, end) for end in ENDS}}
    return row


def _without_each(
    name: str, corpus: str, lines: Sequence[dict[str, Any]], passed: sae_measures.Encoded, tokens: Tokens
) -> pd.DataFrame:
    """A line for each prompt with a counted token: every measure of all quartiles of the counted tokens without it."""
    line = next(one for one in lines if (one["tokens"], one["quartile"]) == (tokens.strict, QUARTILES[0]))
    n = len(tokens.inside)
    n_tokens = np.bincount(tokens.prompt[tokens.counted[tokens.strict]], minlength=n)
    first, second = passed.prompts
    alone = np.bincount(first[(first >= 0) & (second < 0)], minlength=n)
    columns = {measure: line[measure].of_each(n) for measure in MEASURES}
    columns["dead_share"] = (line["dead"] + alone) / line["d_sae"]
    table = pd.DataFrame({"sae": name, "corpus": corpus, "prompt": np.arange(n), "n_tokens": n_tokens, **columns})
    return table.loc[n_tokens > 0]


def _latents(name: str, corpus: str, sae: SAE, passed: sae_measures.Encoded, tokens: Tokens) -> pd.DataFrame:
    fired = passed.fired[tokens.strict]
    total = fired.sum(0)
    if isinstance(sae.score, Wrapped):  # an encoder without rows
        aligned = length = torch.full((sae.d_sae,), torch.nan, dtype=torch.float64)
    else:
        aligned = sae.alignment().double()
        length = sae.encoder_rows().double().norm(dim=-1) * sae.W_dec.double().norm(dim=-1)
    exponent = sae.score.exponents().double().cpu().numpy() if isinstance(sae.score, Cosine) else np.nan
    with np.errstate(invalid="ignore"):
        table = pd.DataFrame(
            {
                "sae": name,
                "corpus": corpus,
                "latent": np.arange(sae.d_sae, dtype=np.int32),
                "frequency": total / tokens.counted[tokens.strict].sum(),
                "fired": total,
                **{f"fired_{quartile.lower()}": n for quartile, n in zip(QUARTILES[1:], fired, strict=True)},
                "mean_activation": passed.activation / np.where(total > 0, total, np.nan),
                "alignment": aligned.cpu().numpy(),
                "cosine": (aligned / length.clamp(min=1e-12)).cpu().numpy(),
                "exponent": exponent,
                "first_prompt": passed.prompts[0].astype(np.int32),
                "second_prompt": passed.prompts[1].astype(np.int32),
            }
        )
    return table.astype({column: "float32" for column, kind in table.dtypes.items() if kind.kind == "f"})


def _left_out(tokens: Tokens, splices: sae_measures.Splices, names: Sequence[str]) -> dict[str, int]:
    """Tokens left out at a site, by reason, and KLs that are not finite."""
    counts = dict(tokens.left_out)
    for counted, found in splices.items():
        for name in (*names, sae_measures.ZERO, sae_measures.MEAN):
            counts[f"KLs not finite ({counted}, {name.strip()})"] = found.n_nonfinite[name]
    return counts


def _way(splices: sae_measures.Splices) -> dict[str, Any]:
    """How the site's SAEs were spliced."""
    notes: dict[str, Any] = {}
    for found in splices.values():
        noted(notes, found)
    return notes


def _described(sae: SAE, site: Site) -> dict[str, Any]:
    return {
        "site": str(site),
        "d_sae": sae.d_sae,
        "score": sae.score.kind,
        "selector": sae.selector.settings(),
        "normalise": sae.normalise.settings(),
        "restore_norm": sae.restore_norm,
        "model_name": sae.model_name,
        "metadata": sae.metadata,
    }
