"""Set activations to norm 1 after one block, alone or all together, by depth, beside rotations by the same distance."""

from dataclasses import dataclass

from diagnostics.commands import command
from diagnostics.commands.inputs import NullRunOptions
from diagnostics.commands.ranges import PositiveInt


@dataclass(frozen=True, kw_only=True)
class UnitNormOptions(NullRunOptions):
    """What happens when activations lose their norm?

    Sets activations to norm 1 after one block (default: after each in turn), a token alone or all tokens of its prompt at
    once, and measures KL(clean || intervened) at the token, in nats, beside a rotation by the same distance. Writes a table
    (Parquet), its tokens, a summary with provenance (JSON) and the figure into --out. In place, at resid_post, horizon 1.

    Examples:
      scripts/unit_norm.py --out results/unit_norm
      scripts/unit_norm.py --layers 7 15 22 --null-model random --out results/null
    """

    tokens: PositiveInt = 500
    """tokens at which the effect is measured, the same at every depth"""


def main(options: UnitNormOptions) -> command.Document:
    """Run the command."""
    from diagnostics.results.result import result_files
    from diagnostics.unit_norm.result import UnitNorm
    from diagnostics.unit_norm.run import unit_norm_sweep

    options.check(result_files(UnitNorm))
    how = options.common() | {"layers": options.layers or None, "tokens": options.tokens}
    return options.measure("setting norms", "row", unit_norm_sweep, *options.load(), **how)


def run() -> None:
    """The command line of `scripts/unit_norm.py`."""
    command.run(UnitNormOptions, main)
