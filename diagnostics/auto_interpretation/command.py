"""Automated interpretation: can a judge who sees a latent's examples tell where it fires?"""

from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Annotated

import tyro

from diagnostics.commands import command
from diagnostics.commands.inputs import ReplayPath
from diagnostics.commands.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Range
from diagnostics.commands.sae_inputs import SAERunOptions


@dataclass(frozen=True, kw_only=True)
class JudgingOptions(SAERunOptions):
    """Can a judge who sees a latent's examples tell where it fires?

    A judge explains each latent from its strongest examples, then scores held-out snippets, as many in which it is active as not. A
    judge is a command that answers one JSON line a request; a baseline that counts tokens stands beside it. Control: the explanation of
    another latent. Writes tables (Parquet), tokens, a summary with provenance (JSON) and a figure into --out.

    Examples:
      scripts/autointerp.py --saes standard cosine --latents 40 --out results/autointerp
      scripts/autointerp.py --judge "python my_judge.py" --out results/judged
    """

    judge: str | None = None
    """command of a judge: reads one JSON request a line, writes one JSON answer a line (default: the token-frequency baseline alone)"""
    judge_timeout: PositiveFloat = 600.0
    """seconds that a judge may take for one answer"""
    layers: tuple[NonNegativeInt, ...] = (15,)
    """blocks, 0-based, for kinds in --saes; an SAE given by name has its own block"""
    n_prompts: PositiveInt = 400
    """prompts sampled from the text"""
    latents: Annotated[int, Range(2)] = 40
    """latents of each SAE, in equal numbers from bins of log frequency; each polarity of a signed latent counts"""
    latent: tuple[NonNegativeInt, ...] = ()
    """these latents, in place of a number"""
    top: PositiveInt = 10
    """strongest examples that explain a latent, one of a prompt"""
    more: NonNegativeInt = 5
    """further examples, drawn with weights |z|"""
    snippets: PositiveInt = 10
    """held-out snippets of each class"""
    width: PositiveInt = 21
    """tokens of an example or snippet"""
    min_active: PositiveInt = 10
    """fitting tokens at which a latent must be active"""
    test_share: Annotated[float, Range(0, 1, above=True, below=True)] = 0.5
    """share of the prompts held out for snippets"""
    batch_rows: Annotated[int | None, tyro.conf.Suppress] = None
    path: Annotated[ReplayPath, tyro.conf.Suppress] = "auto"

    def asked(self) -> dict[str, object]:
        """Keyword arguments of the diagnostic, but for the judge."""
        how = self.named(
            "top", "more", "snippets", "width", "min_active", "test_share", "sink_filter", "seed", "overwrite"
        )
        return how | {"latents": list(self.latent) or self.latents, "folder": self.out}


def main(options: JudgingOptions) -> command.Document:
    """Run the command."""
    from diagnostics.auto_interpretation.judges import CommandJudge
    from diagnostics.auto_interpretation.result import AutoInterp
    from diagnostics.auto_interpretation.run import autointerp

    options.check(AutoInterp.files())
    saes = options.load_saes()
    judge = CommandJudge(options.judge, options.judge_timeout) if options.judge else None
    with closing(judge) if judge else nullcontext():
        given = (*options.load(), saes)
        return options.measure("asking judges", "latent", autointerp, *given, judge=judge, **options.asked())


def run() -> None:
    """The command line of `scripts/autointerp.py`."""
    command.run(JudgingOptions, main)
