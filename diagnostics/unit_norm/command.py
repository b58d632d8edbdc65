"""Activations forced to norm 1 after one block, alone or all together, by depth, beside rotations by the same distance."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from diagnostics.commands import command
from diagnostics.commands.inputs import Inputs
from diagnostics.results.result import result_files
from diagnostics.unit_norm.result import UnitNorm
from diagnostics.unit_norm.run import unit_norm_sweep
from interventions.errors import MechdiagError


@dataclass(frozen=True, kw_only=True)
class UnitNormOptions(Inputs):
    """What if tokens lost their norm?

    Forces activations to norm 1 after one block (default: after each in turn), a token alone or all tokens of its prompt at
    once, and measures KL(clean || intervened) at the token, in nats, beside a rotation by the same distance. Writes a table
    (Parquet), its tokens, a summary with provenance (JSON) and the figure into --out. In place, at resid_post, horizon 1.

    Examples:
      scripts/unit_norm.py --out results/unit_norm
      scripts/unit_norm.py --layers 7 15 22 --null-model random --out results/null
    """

    tokens: int = 500
    """where the effect is read, the same at every depth"""
    sites: Annotated[tuple[str, ...], tyro.conf.Suppress] = ("resid_post",)
    context: Annotated[str, tyro.conf.Suppress] = "in_place"
    horizon: Annotated[str, tyro.conf.Suppress] = "1"


def main(settings: UnitNormOptions) -> command.Document:
    """Everything that can be wrong with the input is looked at before the model runs."""
    settings.check(result_files(UnitNorm))
    how = settings.common()
    if (how.pop("context"), how.pop("horizon"), settings.sites) != ("in_place", 1, ("resid_post",)):
        raise MechdiagError(
            "this sweep runs in place, at resid_post, with horizon 1: leave context, horizon and sites as they are"
        )
    model, prompts = settings.load()
    with settings.progress("forcing norms") as progress:
        result = unit_norm_sweep(
            model, prompts, layers=settings.layers or None, tokens=settings.tokens, progress=progress, **how
        )
    return settings.finish(result, settings.out)


def run() -> None:
    """The command line of `scripts/unit_norm.py`."""
    command.run(UnitNormOptions, main)
