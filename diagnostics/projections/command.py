"""Ablate single directions of SAEs at single tokens: effects beside doses, matched placebos and every score proposed to predict them."""

from dataclasses import dataclass

from diagnostics.commands import command
from diagnostics.projections.options import AblationOptions


@dataclass(frozen=True, kw_only=True)
class ProjectionsOptions(AblationOptions):
    """What does removing an SAE latent's direction do, and which score predicts the effect?

    Removes the projection on a latent's decoder direction at single tokens, beside placebos of the same norm and angle; on a share of
    them also the projection from the mean, the latent, and a dose that does not depend on the token, and ablations of rescaled
    activations. Measures KL(clean || intervened) in nats and the direct effect; says whether it goes with the cosine or with the inner
    product (the norm exponent). Writes a table (Parquet), its tokens, a summary with provenance (JSON) and figures into --out.

    Examples:
      scripts/ablate_projections.py --layers 15 --out results/projections
      scripts/ablate_projections.py --saes cosine --layers 15 --latent 12 345 --out results/two
    """


def main(options: ProjectionsOptions) -> command.Document:
    """Run the command."""
    from diagnostics.projections.result import ProjectionEffects
    from diagnostics.projections.run import projection_effects
    from diagnostics.results.result import result_files

    options.check(result_files(ProjectionEffects))
    saes = options.load_saes()
    return options.measure("ablating", "row", projection_effects, *options.load(), saes, **options.common())


def run() -> None:
    """The command line of `scripts/ablate_projections.py`."""
    command.run(ProjectionsOptions, main)
