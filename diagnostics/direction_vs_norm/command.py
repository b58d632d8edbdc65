"""Direction-vs-norm patching by depth, in context and in a one-token context, beside matched placebos."""

from dataclasses import dataclass

from diagnostics.commands import command
from diagnostics.commands.inputs import Context, PatchingOptions
from diagnostics.commands.ranges import PositiveInt
from diagnostics.direction_vs_norm.choices import PAIR_SETS


@dataclass(frozen=True, kw_only=True)
class DirectionNormOptions(PatchingOptions):
    """Does the model read an activation's direction or its norm?

    Takes tokens B and A of different prompts, gives B's activation A's direction, or A's norm, and measures
    KL(clean || intervened) of the next-token distribution from B on, in nats, by depth. Beside each patch: its dose, its
    direct effect, and a random edit of the same norm and angle. Writes a table (Parquet), its tokens, a summary with
    provenance (JSON) and the figure into --out.

    Examples:
      scripts/patch_direction_norm.py --out results/mine
      scripts/patch_direction_norm.py --layers 7 22 --pairs 200 --null-model random \\
          --out results/null
    """

    context: Context = "both"
    """in_place (B's own prompt and position), single_token (the vector as the only token, id 0), or both"""
    pairs: PositiveInt = 500
    """token pairs in each pair set, the same at every depth"""
    pair_sets: tuple[str, ...] = PAIR_SETS
    """random, same_norm, high_cosine, scale_rotate"""


def main(options: DirectionNormOptions) -> command.Document:
    """Run the command."""
    from diagnostics.direction_vs_norm.result import DirectionNorm
    from diagnostics.direction_vs_norm.run import direction_norm
    from diagnostics.results.result import result_files
    from diagnostics.running.clean import default_layers

    options.check(result_files(DirectionNorm))
    model, prompts = options.load()
    sites = options.places(default_layers(model.n_layers))
    how = options.common() | options.named("pairs", "pair_sets")
    return options.measure("patching", "row", direction_norm, model, prompts, sites=sites, **how)


def run() -> None:
    """The command line of `scripts/patch_direction_norm.py`."""
    command.run(DirectionNormOptions, main)
