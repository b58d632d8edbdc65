"""`n2g`: token patterns of latents, and how well they predict where latents fire."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diagnostics.latent_edits.items import asked_latents, check_numbers
from diagnostics.results.calls import recorded
from diagnostics.running.provenance import run_identity, run_provenance
from diagnostics.running.units import run_table
from diagnostics.token_patterns.result import TokenPatterns
from diagnostics.token_patterns.work import PatternRunner, PatternSettings, joined, split
from interventions.errors import ResultError
from interventions.models.causal_model import CausalModel
from interventions.models.wrapping import wrap
from interventions.progress import Progressing
from interventions.texts.prompts import Prompts, prompts_for
from sae_models.dictionaries import dictionaries_of

PADDING = " _"
"""The padding token's text, as in released code; where a tokenizer makes several tokens of it, its own padding token stands in."""


@recorded
@torch.no_grad()
def n2g(
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    saes: Any,
    *,
    latents: int | Sequence[int] = 40,
    examples: int = 16,
    longest: int = 32,
    min_active: int = 10,
    test_share: float = 0.5,
    pad: int | None = None,
    sink_filter: float | None = 10.0,
    seed: int = 0,
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> TokenPatterns:
    """Neuron-to-graph: patterns of tokens that make a latent fire, kept in a reversed trie, and their precision and recall.

        precision = #(match and z ≠ 0) / #match,   recall = #(match and z ≠ 0) / #(z ≠ 0),   over tokens of held-out prompts

    Patterns come from activating examples on the fitting prompts (`fit_patterns`): the shortest suffix that keeps half of the activation,
    tokens whose replacement by padding keeps more than half as wildcards. A latent of either sign has patterns for each polarity.
    Beside them sets of current tokens of as many entries, the best single pattern and token, and the same procedure on a random direction
    that is active as often (`work`).

    saes: an SAE, or several by name, each at its own site. latents: how many (latent, polarity) of each, in equal numbers from bins of log
    frequency, or which. examples: of each, in equal numbers from quarters of |z|. longest: tokens of a suffix. min_active: active fitting
    tokens that a latent needs. test_share: prompts held out, by seeded hash. pad: the padding token's id (default: that of " _", or the
    tokenizer's padding token). In `folder` each latent is kept as it is done.

    Raises `BelongingError`, `SiteError` for an SAE of another width, model or site; `ResultError` for invalid settings, latents that are
    too rare, no padding token. Source: arXiv:2305.19911, and the released code of arXiv:2406.04093; every branch of the trie is
    searched, examples cover all activations, and baselines, control and intervals are ours.
    """
    model = wrap(model)
    prompts = prompts_for(model, prompts)
    check_numbers(examples=examples, longest=longest, min_active=min_active)
    asked = asked_latents(latents)
    dictionaries = dictionaries_of(saes, model, None)
    if plain := [d.name for d in dictionaries if d.sae is None]:
        raise ResultError(f"{plain[0]!r} are directions; this needs SAEs, which say where latents are active")
    settings = PatternSettings(
        examples, longest, min_active, test_share, padding(model, pad), sink_filter or None, seed
    )
    runner = PatternRunner(model, prompts, dictionaries, asked, settings)
    own = {"saes": {d.name: d.provenance() for d in dictionaries}, "latents": asked, **vars(settings)}
    frame, notes = run_table(
        runner.units(), folder, runner, joined,
        identity=run_identity(TokenPatterns.NAME, model, prompts, own), overwrite=overwrite, progress=progress,
    )  # fmt: skip
    tables = split(frame)
    said = own | {"test_prompts": np.flatnonzero(runner.test).tolist(), "rows": len(tables["fits"]), **notes}
    sites = list(dict.fromkeys(d.site for d in dictionaries))
    provenance = run_provenance(TokenPatterns.NAME, model, prompts, sites, said)
    return TokenPatterns(tables["fits"], prompts.tokens, provenance, tables["patterns"], tables["held_out"])


def padding(model: CausalModel, pad: int | None) -> int:
    """The padding token's id. Raises `ResultError` for one outside the vocabulary, and where there is none."""
    tokenizer = model.tokenizer
    if pad is None and tokenizer is not None:
        ids = tokenizer.encode(PADDING, add_special_tokens=False)
        unknown = getattr(tokenizer, "unk_token_id", None)
        pad = ids[0] if len(ids) == 1 and ids[0] != unknown else tokenizer.pad_token_id
    if pad is None:
        raise ResultError("the tokenizer has no padding token; give pad=, the id of a token that says little")
    size = model.hf.get_input_embeddings().num_embeddings
    if not 0 <= pad < size:
        raise ResultError(f"padding token {pad}; expected an id from 0, below {size}")
    return int(pad)
