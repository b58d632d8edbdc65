"""Patch activations of one prompt into the run of another, cell by cell, beside matched controls."""

from dataclasses import dataclass
from typing import Literal

from diagnostics.commands import command
from diagnostics.commands.inputs import PairOptions
from diagnostics.commands.ranges import NonNegativeInt
from interventions.sites import INSIDE, POINTS, Site


@dataclass(frozen=True, kw_only=True)
class ActivationPatchingOptions(PairOptions):
    """Which activations carry what differs between two prompts?

    Puts what stands at each cell (site, block, head, position) in one run of a pair into the other run, in both directions,
    and measures the logit difference of the two answers. Each cell is also moved as far along the difference of two other
    pairs: its control. Writes a table (Parquet), the pairs' tokens, a summary with provenance (JSON), and maps into --out.

    Examples:
      scripts/activation_patching.py --task ioi --n 20 --out results/ioi
      scripts/activation_patching.py --pairs my_pairs.csv --sites z mlp_out --scores gradient --out results/mine
    """

    sites: tuple[str, ...] = ("z",)
    """z, q, k, v, pattern (each head is a cell), neurons, resid_pre, attn_out, resid_mid, mlp_out, resid_post; or single sites
    such as 15.z"""
    layers: tuple[NonNegativeInt, ...] = ()
    """blocks (default: all)"""
    positions: Literal["each", "all"] = "each"
    """each position is a cell, or all differing positions at once"""
    directions: tuple[Literal["denoise", "noise"], ...] = ("denoise", "noise")
    """denoise: clean into corrupt; noise: corrupt into clean"""
    controls: NonNegativeInt = 1
    """controls of each cell"""
    scores: tuple[Literal["gradient", "ig5", "ig20", "dla"], ...] = ()
    """cheap estimates beside the exact effects: gradient x difference, integrated gradients, direct logit attribution"""


def main(options: ActivationPatchingOptions) -> command.Document:
    """Run the command."""
    from diagnostics.patching.result import ActivationPatching
    from diagnostics.patching.run import activation_patching
    from diagnostics.results.result import result_files

    for name in options.sites:
        if name not in (*POINTS, *INSIDE):
            Site.parse(name)
    options.check(result_files(ActivationPatching))
    own = options.named("sites", "positions", "directions", "controls", "scores")
    how = options.common() | own | {"layers": options.layers or None}
    model = options.load_model()
    return options.measure("patching", "row", activation_patching, model, options.pairs or options.task, **how)


def run() -> None:
    """The command line of `scripts/activation_patching.py`."""
    command.run(ActivationPatchingOptions, main)
