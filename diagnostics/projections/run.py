"""`projection_effects`: single directions of SAEs are removed at single tokens.

One line a (latent, token, edit): effects beside every score that is said to predict them, every dose, and matched placebos.
The statistics are in `summary`; how latents and tokens are drawn, in `sampling.latents`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diagnostics.projections.design import EDITS, PARTS, REFERENCES, DrawnLatents, ProjectionDesign, ProjectionPlan
from diagnostics.projections.result import ProjectionEffects
from diagnostics.results.calls import recorded
from diagnostics.running.clean import METRICS, RunSettings, chosen_contexts
from diagnostics.running.single_edits import run_single_edits
from diagnostics.sampling.latents import SAMPLINGS
from interventions.errors import ResultError
from interventions.models.wrapping import wrap
from interventions.progress import Progressing
from interventions.recording import Recording
from interventions.sites import SiteLike, several
from interventions.texts.prompts import Prompts
from sae_models.dictionaries import Dictionary, dictionaries_of


@recorded
@torch.no_grad()
def projection_effects(
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str] | Recording,
    saes: Any,
    *,
    site: SiteLike | None = None,
    latents: int | Sequence[int] = 200,
    tokens_per_latent: int = 200,
    sampling: str = "stratified",
    reference: str = "zero",
    detail: float = 0.25,
    edits: str = "all",
    angle: float = 0.1,
    single_token_share: float = 0.1,
    metrics: str | Sequence[str] = METRICS,
    context: str = "in_place",
    sink_filter: float | None = 10.0,
    seed: int = 0,
    null_seeds: int = 0,
    batch_rows: int | None = None,
    path: str = "auto",
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> ProjectionEffects:
    """Remove single directions from single activations, and measure the KL beside what is said to predict it.

        zero    x − <x, d̂>·d̂             mean    x − <x − μ, d̂>·d̂        (μ: mean of the usable tokens)
        latent  x − z_i·d_i               cosine  x − cos(x, d̂)·C·d̂      (C: median ‖x‖ of the site)

    saes: an SAE (anything that `as_sae` takes), directions `[n, d_model]` of any length, or several of these by name, each at the
    site it belongs to; `site` is where directions act. latents: how many of each SAE, or which. sampling: see
    `sampling.latents.SAMPLINGS`. reference: the ablation that every (latent, token) gets, beside two placebos of its norm and angle
    (`placebo_token`: along the difference of two other tokens' activations; `placebo_isotropic`). detail: share of the pairs that
    get half of the projection removed (`half`), and the ablation of s·x, s .9 and 1.1, against the run with s·x (`scaled`), each
    with both placebos (9 rows, the norm exponent's experiment), and, unless `edits` is "rescaled", the other three ablations and a
    rotation of x away from d̂ by a fixed `angle` (radians) with both placebos (`rotate`, ...: equal dose for all; 6 rows). A sixteenth
    is put back as it was (`self`, the noise floor). single_token_share: share of the latents that also go into the one-token context,
    where `context` asks for it, main edit and placebos alone. metrics: `kl` and `clean_entropy` must be among them. Other arguments as in `direction_norm`.

    Raises `BelongingError` for an SAE of another model, width or site, `ResultError` for invalid settings, `EditError` for
    directions that are no vectors of the model. Source: arXiv:2606.15054, sections on projection ablation; sampling, references,
    placebos, fixed-dose and scaled ablation are ours.
    """
    model = wrap(model)
    for name, value, known in (
        ("sampling", sampling, SAMPLINGS),
        ("reference", reference, REFERENCES),
        ("edits", edits, PARTS),
    ):
        if value not in known:
            raise ResultError(f"{name} {value!r}; known: {', '.join(known)}")
    many = latents if isinstance(latents, int) else len(latents)
    if many < 1 or tokens_per_latent < 1:
        raise ResultError(f"{many} latents, {tokens_per_latent} tokens of each; ask for at least one")
    if not 0 <= detail <= 1 or not 0 < single_token_share <= 1 or not 0 < angle < np.pi / 2:
        raise ResultError(
            f"detail {detail}, single_token_share {single_token_share}, angle {angle}; expected shares up to 1, and an angle "
            "above 0 and below π/2 radians"
        )
    metrics = several(metrics)
    if missing := [name for name in ("kl", "clean_entropy") if name not in metrics]:
        raise ResultError(f"metrics {list(metrics)} lack {missing[0]!r}, which the statistics need")
    if isinstance(prompts, Recording):
        prompts = [row[:n].tolist() for row, n in zip(prompts.tokens, prompts.length.tolist(), strict=True)]
    dictionaries = dictionaries_of(saes, model, site)
    ids = None if isinstance(latents, int) else tuple(int(i) for i in latents)
    plan = ProjectionPlan(many, ids, tokens_per_latent, sampling, reference, detail, angle, single_token_share, edits)
    settings = RunSettings(
        sites=tuple(dict.fromkeys(d.site for d in dictionaries)), contexts=chosen_contexts(context), metrics=metrics,
        sink_filter=sink_filter, seed=seed, null_seeds=null_seeds, batch_rows=batch_rows, path=path,
    )  # fmt: skip
    own = {"saes": {d.name: d.provenance() for d in dictionaries}} | plan.provenance()
    order = {
        "sae": list(own["saes"]),
        "latent": (),
        "target_prompt": (),
        "target_position": (),
        "edit": EDITS,
        "scale": (),
    }
    return run_single_edits(
        ProjectionEffects, model, prompts, _DesignMaker(dictionaries, plan), settings, own, order,
        folder=folder, overwrite=overwrite, progress=progress,
    )  # fmt: skip


class _DesignMaker:
    """Designs for one model after another; the latents are drawn of the trained one, which comes first, for all."""

    def __init__(self, dictionaries: list[Dictionary], plan: ProjectionPlan):
        self.dictionaries, self.plan = dictionaries, plan
        self.latents: dict[str, DrawnLatents] | None = None

    def __call__(self, clean: Any) -> ProjectionDesign:
        design = ProjectionDesign(clean, self.dictionaries, self.plan, self.latents)
        self.latents = self.latents or design.latents
        return design
