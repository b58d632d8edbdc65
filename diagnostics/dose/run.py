"""`dose_response`: edits of the same length along directions that differ in meaning.

Ours: arXiv:2606.15054 compares a direction patch with a norm patch that moves x four to ten times less.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diagnostics.dose.choices import DOSES
from diagnostics.dose.design import SELF, DoseDesign, direction_digest, edit_names
from diagnostics.dose.result import DoseResponse
from diagnostics.dose.summary import SHORT_COLUMNS
from diagnostics.results.calls import recorded
from diagnostics.running.clean import RunSettings, chosen_contexts, chosen_sites
from diagnostics.running.single_edits import run_single_edits
from interventions.edits import norm
from interventions.errors import EditError, ResultError
from interventions.models.uploads import as_vectors
from interventions.models.wrapping import wrap
from interventions.progress import Progressing
from interventions.replaying.rows import Horizon
from interventions.sites import SiteLike, several
from interventions.texts.prompts import Prompts


@recorded
@torch.no_grad()
def dose_response(
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str],
    *,
    layers: int | Sequence[int] | None = None,
    sites: SiteLike | Sequence[SiteLike] | None = None,
    doses: float | Sequence[float] = DOSES,
    directions: Mapping[str, Any] | Tensor | None = None,
    tokens: int = 200,
    context: str = "in_place",
    horizon: Horizon = 1,
    sink_filter: float | None = 10.0,
    seed: int = 0,
    null_seeds: int = 0,
    batch_rows: int | None = None,
    path: str = "auto",
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> DoseResponse:
    """Move activations by a share of their own norm, along directions that differ in meaning, and measure the KL.

        ‖Δx‖ = dose·‖x‖        toward_token, between_tokens, isotropic: rotations, ‖x‖ kept
                               norm_up, norm_down: (1 ± dose)·x

    doses: shares of ‖x‖, above 0; a rotation moves x by at most 2‖x‖, and 1 down is zero ablation. directions: by name, of
    any length, `[d_model]`, e.g. a steering vector: x + dose·‖x‖·d̂, beside edits of the same norm and angle along both
    kinds of random tangent (`name_placebo_token`, `name_placebo_isotropic`). tokens: edited tokens, each with a source of
    another prompt; the same at every depth. Other arguments as in `direction_norm`.

    Raises `EditError` for a direction that is no vector of the model or of norm 0, `ResultError` for invalid doses.
    """
    model = wrap(model)
    places = chosen_sites(model, layers, sites)
    doses = tuple(sorted(dict.fromkeys(float(d) for d in several(doses))))
    if not doses or not all(0 < dose <= 2 for dose in doses):
        raise ResultError(f"doses {list(doses)}; expected numbers above 0 and up to 2, shares of the activation's norm")
    if tokens < 1:
        raise ResultError(f"{tokens} tokens asked for; ask for at least one")
    named = directions if isinstance(directions, Mapping) else {} if directions is None else {"given": directions}
    given = {name: _checked(name, d, model.d_model) for name, d in named.items()}
    names = [SELF, *edit_names(given)]
    said = [name.replace("_", " ") for name in names]
    if twice := [name for i, name in enumerate(names) if said[i] in said[:i]]:
        raise EditError(f"two edits have the name {twice[0]!r}; give the direction another name")
    settings = RunSettings(
        sites=places, contexts=chosen_contexts(context), horizon=horizon, sink_filter=sink_filter, seed=seed, null_seeds=null_seeds,
        batch_rows=batch_rows, path=path,
    )  # fmt: skip
    digests = {name: direction_digest(direction) for name, direction in given.items()}
    return run_single_edits(
        DoseResponse, model, prompts, lambda clean: DoseDesign(clean, tokens, doses, given), settings,
        {"tokens_asked": tokens, "doses": list(doses), "directions": digests}, {"pair": (), "edit": names, "dose": ()},
        folder=folder, overwrite=overwrite, progress=progress,
    )  # fmt: skip


def _checked(name: str, direction: Any, d_model: int) -> Tensor:
    """A direction in float64 on the CPU. Raises `EditError` for one that is none of the model's, or of a name that tables cannot hold."""
    direction = as_vectors(direction).detach().double().cpu()
    if direction.shape != (d_model,) or not bool(direction.isfinite().all()) or not bool(direction.any()):
        raise EditError(
            f"direction {name!r} has shape {list(direction.shape)} and norm {float(norm(direction)):.3g}; expected "
            f"[{d_model}], finite and not zero"
        )
    said = name.replace("_", " ")
    if not said.strip() or "÷" in said or said in SHORT_COLUMNS or said.startswith("untrained"):
        raise EditError(
            f"a direction is called {name!r}, which tables need for something else; give it another name, without ÷"
        )
    return direction
