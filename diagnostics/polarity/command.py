"""Train signed and unsigned SAEs on planted antipodal pairs: error, anomalies and geometry by polarity."""

from dataclasses import dataclass
from typing import Annotated

from diagnostics.commands import command
from diagnostics.commands.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range


@dataclass(frozen=True, kw_only=True)
class PolarityOptions(command.OutputOptions):
    """Does one signed latent represent both polarities of a planted direction?

    Plants antipodal pairs of directions in random data (no model, no text), trains SAEs with signed latents (one a pair) and
    unsigned ones (one a polarity) on the same rows, and measures: error against L0 and calibration by polarity (A), detection of
    a polarity never seen in training (B), pairs in one latent (C). Writes tables (Parquet), a summary with settings (JSON) and
    the figure into --out. Our reconstruction of the protocols of arXiv:2605.28149.

    Examples:
      scripts/polarity.py --out results/polarity
      scripts/polarity.py --rhos -1 0 --seeds 1 --superpositions 1 --out results/quick
    """

    d_model: Annotated[int, Range(2)] = 24
    """dimensions of the data"""
    active: PositiveFloat = 3.0
    """mean number of active pairs a row"""
    noise: NonNegativeFloat = 0.03
    """standard deviation of each coordinate's noise; amplitudes are .5 to 1.5"""
    rhos: tuple[Annotated[float, Range(-1, 0)], ...] = (-1.0, -0.5, 0.0)
    """correlation of the two polarities in an active pair: -1 (exactly one is on) to 0 (independent)"""
    superpositions: tuple[PositiveFloat, ...] = (1.0, 1.5, 2.0)
    """pairs ÷ dimensions, for protocol C"""
    budgets: tuple[PositiveInt, ...] = (3, 6, 12, 24)
    """numbers read for detection, for protocol B"""
    ks: tuple[PositiveInt, ...] = (2, 3, 4)
    """active latents of topk and abstopk; B and C take the middle one"""
    l1s: tuple[PositiveFloat, ...] = (1.2, 0.9, 0.6)
    """penalties of the gates; B and C take the middle one"""
    steps: PositiveInt = 400
    """training steps of each SAE"""
    batch: PositiveInt = 256
    """rows a step"""
    test_rows: PositiveInt = 4000
    """rows that are measured"""
    seeds: PositiveInt = 3
    """of directions, rows and first weights, from --seed on"""
    seed: NonNegativeInt = 0
    """the first seed"""
    device: str = "cpu"
    """cpu, cuda or cuda:1"""


def main(options: PolarityOptions) -> command.Document:
    """Run the command."""
    from diagnostics.polarity.result import Polarity
    from diagnostics.polarity.run import polarity_protocols
    from diagnostics.results.result import result_files
    from interventions.files import claim_run
    from interventions.models.loading import resolve_device

    resolve_device(options.device)
    claim_run(options.out, result_files(Polarity), options.overwrite)
    names = (
        "d_model",
        "active",
        "noise",
        "rhos",
        "superpositions",
        "budgets",
        "ks",
        "l1s",
        "steps",
        "batch",
        "test_rows",
    )
    how = options.named(*names, "seeds", "seed", "device")
    return options.measure("training SAEs", "step", polarity_protocols, **how)


def run() -> None:
    """The command line of `scripts/polarity.py`."""
    command.run(PolarityOptions, main)
