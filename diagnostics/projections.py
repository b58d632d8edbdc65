"""What does removing a direction from an activation do, and which score of the direction predicts it?

One line a (latent, token, edit): effects beside every score that is said to predict them, every dose, and matched placebos.
The statistics stand in `projection_summary`; how latents and tokens are drawn in `latent_sampling`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pandas as pd
import torch

from diagnostics.depth_plans import DepthPlan
from diagnostics.headlines import Headline
from diagnostics.latent_sampling import SAMPLINGS
from diagnostics.probes import Probe, probes_of
from diagnostics.progress import Progressing
from diagnostics.projection_design import EDITS, REFERENCES, Latents, Plan, Projections
from diagnostics.projection_summary import NOTE, first_numbers, short_frame, summaries, summary_frame, within_floors
from diagnostics.projections_depth import PLANS
from diagnostics.results import Result
from diagnostics.study import METRICS, TRAINED, Settings, chosen_contexts, run_study
from interventions.errors import ResultError
from interventions.models import wrap
from interventions.recording import Recording
from interventions.sites import Site
from interventions.texts import Prompts


@dataclass(frozen=True)
class ProjectionEffects(Result):
    """What ablations of directions did, row by row, and how it was made.

    The table has a line for each model × layer × point × context × SAE × latent × token × edit; its columns are those of `COLUMNS`.
    """

    NAME: ClassVar[str] = "projections"
    TITLE: ClassVar[str] = "Ablated directions"
    QUESTION: ClassVar[str] = "Does the effect of removing a direction go with the cosine or with the inner product?"
    CALL: ClassVar[str] = "projection_effects"
    NOTE: ClassVar[str] = NOTE
    DEPTH: ClassVar[Mapping[str, DepthPlan]] = PLANS
    NULL_MODELS: ClassVar[bool] = True

    @property
    def main(self) -> str:
        """The edit that every row pair has, with its placebos: one of `REFERENCES`."""
        return self.provenance["reference"]

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Statistics of each model × layer × point × context × SAE."""
        return summaries(self.frame, self.provenance)

    @property
    def defaults(self) -> dict[str, Any]:
        """The model itself; the first point and context."""
        return {"model": TRAINED, "point": self.points[0], "context": self.provenance["context"][0]}

    def rows(self, group: Mapping[str, Any]) -> pd.DataFrame:
        """The table's lines of a group (anything with its model, layer, point, context and sae)."""
        keys = ("model", "layer", "point", "context", "sae")
        own = np.logical_and.reduce([self.frame[key] == group[key] for key in keys])
        return cast(pd.DataFrame, self.frame.loc[own])

    def summary(self) -> pd.DataFrame:
        """One row per model, layer, point, context and SAE: mean KL of each edit, ratios to placebos, exponents, with intervals."""
        return summary_frame(self.groups)

    def headlines(self) -> Iterable[Headline]:
        """Of each SAE, the effect over its placebo's."""
        return first_numbers(self.select())

    def left_out(self) -> list[str]:
        """What is missing, and how many rows lie within the noise floor; a line each."""
        return [*within_floors(self.groups), *super().left_out()]

    def plot(self, context: str | None = None) -> Any:
        """The norm exponent by depth: observational, interventional, learned. Returns a matplotlib Figure."""
        from diagnostics.projection_plots import plot_exponents

        groups = [g for g in self.groups if g["point"] == self.points[0]]
        return plot_exponents(groups, self.provenance, [context] if context else self.provenance["context"])

    def plot_dose(self, sae: str | None = None, latents: Sequence[int] | None = None) -> Any:
        """KL against dose for some latents, coloured by norm. Returns a matplotlib Figure."""
        from diagnostics.projection_plots import plot_dose

        groups = self.select()
        group = next((g for g in groups if g["sae"] == sae), None) if sae else groups[len(groups) // 2]
        if group is None:
            raise ResultError(f"no SAE {sae!r} in this result; known: {', '.join(self.saes)}")
        return plot_dose(self.rows(group), self.provenance, latents)

    def figures(self) -> dict[str, Any]:
        """Exponents by depth; KL against dose of some latents of the SAE in the middle."""
        return {f"{self.NAME}_exponent": self.plot(), f"{self.NAME}_dose": self.plot_dose()}

    def tables(self) -> dict[str, pd.DataFrame]:
        """Effects and exponents, a line for each model, context, block and SAE."""
        return {"": short_frame(self.groups)}


COLUMNS = (
    "model", "layer", "point", "context", "sae", "latent", "target_prompt", "target_position", "edit", "scale",
    "frequency", "latent_weight", "token_weight", "learned_a", "norm_quartile", "norm", "norm_centred", "norm_read", "cosine",
    "inner", "cosine_centred", "inner_centred", "cosine_encoder", "inner_encoder", "cosine_encoder_centred",
    "inner_encoder_centred", "activation", "dose_zero", "dose_mean", "dose_latent", "removed", "delta_norm", "delta_angle", "kl", "js",
    "clean_entropy", "top1_changed", "kl_direct",
)  # fmt: skip
"""Of the table. edit: one of `EDITS`; scale: s where the edited and the clean run have s·x in place of x, else 1; removed: share of
the projection taken away. frequency: share of usable tokens on which the latent fires; latent_weight, token_weight: how many
latents of the SAE, tokens of the text, each stands for; learned_a: the exponent of a cosine-scored SAE. norm_quartile: 0 to 3, of
‖x‖ over the site's usable tokens; norm_read: what the next block's norm divides by, ‖x − mean(x)‖ under LayerNorm, ‖x‖ under
RMSNorm. cosine, inner: of x (`_centred`: of x_c) and the decoder row (`_encoder`: the encoder row; nan where there is none);
activation: z. dose_zero, dose_mean, dose_latent: |<x, d̂>|, |<x − μ, d̂>|, |z|·‖d‖, what the three references remove; delta_norm,
delta_angle: of this edit, L2 norm and radians. Effects as in the direction-norm table, nats."""


@torch.no_grad()
def projection_effects(
    model: Any,
    prompts: Prompts | Sequence[Sequence[int]] | Sequence[str] | Recording,
    saes: Any,
    *,
    site: Site | None = None,
    latents: int | Sequence[int] = 200,
    tokens_per_latent: int = 200,
    sampling: str = "stratified",
    reference: str = "zero",
    detail: float = 0.25,
    angle: float = 0.1,
    single_token_share: float = 0.1,
    metrics: Sequence[str] = METRICS,
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
    `latent_sampling.SAMPLINGS`. reference: the ablation that every (latent, token) gets, beside two placebos of its norm and angle
    (`placebo_token`: along the difference of two other tokens' activations; `placebo_isotropic`). detail: share of the pairs that
    get the other three ablations too, a rotation of x away from d̂ by a fixed `angle` (radians) with both placebos (`rotate`, ...:
    equal dose for all), half of the projection removed (`half`), and the ablation of s·x, s .9 and 1.1, against the run with s·x
    (`scaled`). A sixteenth is put back as it was (`self`, the noise floor). single_token_share: share of the latents that also go into
    the one-token context, where `context` asks for it, main edit and placebos alone. metrics: `kl` and `clean_entropy` must be among
    them. Other arguments as in `direction_norm`.

    Raises `BelongingError` for an SAE of another model, width or site, `ResultError` for settings that do not serve, `EditError` for
    directions that are no vectors of the model. Source: arXiv:2606.15054, sections on projection ablation; sampling, references,
    placebos, fixed-dose and scaled ablation are ours.
    """
    model = wrap(model)
    if sampling not in SAMPLINGS or reference not in REFERENCES:
        raise ResultError(
            f"sampling {sampling!r}, reference {reference!r}; known: {', '.join(SAMPLINGS)}; {', '.join(REFERENCES)}"
        )
    many = latents if isinstance(latents, int) else len(latents)
    if many < 1 or tokens_per_latent < 1:
        raise ResultError(f"{many} latents, {tokens_per_latent} tokens of each; ask for at least one")
    if not 0 <= detail <= 1 or not 0 < single_token_share <= 1 or not 0 < angle < np.pi / 2:
        raise ResultError(
            f"detail {detail}, single_token_share {single_token_share}, angle {angle}; expected shares up to 1, and an angle "
            "above 0 and below π/2 radians"
        )
    if missing := [name for name in ("kl", "clean_entropy") if name not in metrics]:
        raise ResultError(f"metrics {list(metrics)} lack {missing[0]!r}, which the statistics need")
    if isinstance(prompts, Recording):
        prompts = [row[:n].tolist() for row, n in zip(prompts.tokens, prompts.length.tolist(), strict=True)]
    probes = probes_of(saes, model, site)
    ids = None if isinstance(latents, int) else tuple(int(i) for i in latents)
    plan = Plan(many, ids, tokens_per_latent, sampling, reference, detail, angle, single_token_share)
    settings = Settings(
        sites=tuple(dict.fromkeys(probe.site for probe in probes)),
        contexts=chosen_contexts(context),
        metrics=tuple(metrics),
        sink_filter=sink_filter,
        seed=seed,
        null_seeds=null_seeds,
        batch_rows=batch_rows,
        path=path,
    )
    make = _Maker(probes, plan)
    study = run_study(
        ProjectionEffects.NAME,
        model,
        prompts,
        make,
        settings,
        {"saes": {p.name: p.provenance() for p in probes}} | plan.provenance(),
        {
            "sae": [p.name for p in probes],
            "latent": (),
            "target_prompt": (),
            "target_position": (),
            "edit": EDITS,
            "scale": (),
        },
        folder=folder,
        overwrite=overwrite,
        progress=progress,
    )
    return ProjectionEffects(study.frame, study.tokens, study.provenance)


class _Maker:
    """Designs for one model after another; the latents are drawn of the trained one, which comes first, for all."""

    def __init__(self, probes: list[Probe], plan: Plan):
        self.probes, self.plan = probes, plan
        self.latents: dict[str, Latents] | None = None

    def __call__(self, clean: Any) -> Projections:
        design = Projections(clean, self.probes, self.plan, self.latents)
        self.latents = self.latents or design.latents
        return design
