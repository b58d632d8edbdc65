"""N2G: which token patterns make the latents of SAEs fire?"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from diagnostics.commands import command
from diagnostics.commands.inputs import ReplayPath
from diagnostics.commands.ranges import NonNegativeInt, PositiveInt, Range
from diagnostics.commands.sae_inputs import SAERunOptions


@dataclass(frozen=True, kw_only=True)
class PatternOptions(SAERunOptions):
    """Which token patterns make a latent fire, and how well do they predict it?

    Neuron-to-graph: the shortest suffix of an example that keeps half of the activation, with wildcards for tokens that do not matter;
    precision and recall of all patterns on held-out prompts, beside sets of single tokens and a random direction that is active as
    often. Writes tables (Parquet), tokens, a summary with provenance (JSON) and a figure into --out.

    Examples:
      scripts/n2g.py --saes standard cosine --latents 24 --out results/n2g
      scripts/n2g.py --saes standard --latent 12 345 --out results/n2g_some
    """

    layers: tuple[NonNegativeInt, ...] = (15,)
    """blocks, 0-based, for kinds in --saes; an SAE given by name has its own block"""
    n_prompts: PositiveInt = 400
    """prompts sampled from the text"""
    latents: PositiveInt = 40
    """latents of each SAE, in equal numbers from bins of log frequency; each polarity of a signed latent counts"""
    latent: tuple[NonNegativeInt, ...] = ()
    """these latents, in place of a number"""
    examples: PositiveInt = 16
    """activating examples of each latent"""
    longest: PositiveInt = 32
    """longest suffix, in tokens"""
    min_active: PositiveInt = 10
    """fitting tokens at which a latent must be active"""
    test_share: Annotated[float, Range(0, 1, above=True, below=True)] = 0.5
    """share of the prompts held out to judge patterns"""
    pad: NonNegativeInt | None = None
    """id of the padding token (default: that of " _", or the tokenizer's padding token)"""
    batch_rows: Annotated[int | None, tyro.conf.Suppress] = None
    path: Annotated[ReplayPath, tyro.conf.Suppress] = "auto"

    def asked(self) -> dict[str, object]:
        """Keyword arguments of the diagnostic."""
        how = self.named("examples", "longest", "min_active", "test_share", "pad", "sink_filter", "seed", "overwrite")
        return how | {"latents": list(self.latent) or self.latents, "folder": self.out}


def main(options: PatternOptions) -> command.Document:
    """Run the command."""
    from diagnostics.token_patterns.result import TokenPatterns
    from diagnostics.token_patterns.run import n2g

    options.check(TokenPatterns.files())
    saes = options.load_saes()
    return options.measure("probing latents", "latent", n2g, *options.load(), saes, **options.asked())


def run() -> None:
    """The command line of `scripts/n2g.py`."""
    command.run(PatternOptions, main)
