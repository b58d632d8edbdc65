"""Patch every coalition of some heads and MLPs, and divide the joint effect among them."""

from dataclasses import dataclass
from typing import Literal

from diagnostics.commands import command
from diagnostics.commands.inputs import PairOptions
from diagnostics.commands.ranges import PositiveInt


@dataclass(frozen=True, kw_only=True)
class ShapleyOptions(PairOptions):
    """How do heads and MLPs share an effect, and which stand in for one another?

    Patches every coalition of the components from one run of each pair into the other (up to 10 components, 16 for a single
    pair; more by sampled orders). Writes a table (Parquet), the pairs' tokens, Shapley values and pairwise interactions with
    provenance (JSON), and a figure into --out.

    Examples:
      scripts/shapley.py --task ioi --n 20 --components 20.z.0 23.z.3 24.z.4 29.z.1 --out results/shapley
      scripts/shapley.py --components 17.z.4 20.z.0 0.mlp_out --direction noise --out results/noise
    """

    components: tuple[str, ...]
    """two or more: heads such as 20.z.0, MLPs such as 0.mlp_out, or other sites"""
    positions: Literal["all", "last"] = "all"
    """patched at every position from the first differing token on, or at the last alone"""
    direction: Literal["denoise", "noise"] = "denoise"
    """denoise: clean into corrupt; noise: corrupt into clean"""
    orders: PositiveInt | None = None
    """sample so many orders in which the components join (default: all coalitions)"""


def main(options: ShapleyOptions) -> command.Document:
    """Run the command."""
    from diagnostics.coalitions.result import Shapley
    from diagnostics.coalitions.run import shapley
    from diagnostics.results.result import result_files

    options.check(result_files(Shapley))
    how = options.common() | options.named("positions", "direction", "orders")
    model, pairs = options.load_model(), options.pairs or options.task
    return options.measure("patching coalitions", "row", shapley, model, pairs, options.components, **how)


def run() -> None:
    """The command line of `scripts/shapley.py`."""
    command.run(ShapleyOptions, main)
