"""Patch activations of one prompt into the run of another, cell by cell, beside matched controls."""

from dataclasses import dataclass
from typing import Literal

from diagnostics.commands import command
from diagnostics.commands.command import ResumableOptions
from diagnostics.commands.inputs import ModelOptions, ReplayPath
from diagnostics.commands.ranges import NonNegativeInt, PositiveInt
from diagnostics.patching.result import ActivationPatching
from diagnostics.patching.run import activation_patching
from diagnostics.results.result import result_files
from interventions.files import claim_run
from interventions.sites import INSIDE, POINTS, Site


@dataclass(frozen=True, kw_only=True)
class ActivationPatchingOptions(ResumableOptions, ModelOptions):
    """Which activations carry what differs between two prompts?

    Puts what stands at each cell (site, block, head, position) in one run of a pair into the other run, in both directions,
    and measures the logit difference of the two answers. Each cell is also moved as far along the difference of two other
    pairs: its control. Writes a table (Parquet), the pairs' tokens, a summary with provenance (JSON), and maps into --out.

    Examples:
      scripts/activation_patching.py --task ioi --n 20 --out results/ioi
      scripts/activation_patching.py --pairs my_pairs.csv --sites z mlp_out --scores gradient --out results/mine
    """

    task: Literal["ioi", "agreement", "capitals", "greater_than", "pronouns"] = "ioi"
    """packaged templates; pairs that the model does not answer are left out and counted"""
    pairs: str | None = None
    """in place of --task: a CSV with columns clean, corrupt, right, wrong, and perhaps roles"""
    n: PositiveInt | None = None
    """number of pairs (default: 100 of a task, all of a CSV)"""
    sites: tuple[str, ...] = ("z",)
    """z, q, k, v, pattern (each head is a cell), neurons, resid_pre, attn_out, resid_mid, mlp_out, resid_post; or single sites
    such as 15.z"""
    layers: tuple[NonNegativeInt, ...] = ()
    """blocks (default: all)"""
    positions: Literal["each", "all"] = "each"
    """each position is a cell, or all differing positions at once"""
    directions: tuple[Literal["denoise", "noise"], ...] = ("denoise", "noise")
    """denoise: clean into corrupt; noise: corrupt into clean"""
    metric: Literal["logit_difference", "probability"] = "logit_difference"
    """of the right answer against the wrong one, or of the right answer"""
    controls: NonNegativeInt = 1
    """controls of each cell"""
    scores: tuple[Literal["gradient", "ig5", "ig20", "dla"], ...] = ()
    """cheap estimates beside the exact effects: gradient x difference, integrated gradients, direct logit attribution"""
    batch_rows: PositiveInt | None = None
    """tokens in one forward pass (default: 512 on the CPU, 4096 elsewhere); halved when memory runs out"""
    path: ReplayPath = "auto"
    """auto (replay, checked against full forward passes), replay, or hooks (full forward passes)"""
    seed: NonNegativeInt = 0
    """of drawn pairs and controls"""


def main(options: ActivationPatchingOptions) -> command.Document:
    """Run the command."""
    options.check_model()
    for name in options.sites:
        if name not in (*POINTS, *INSIDE):
            Site.parse(name)
    claim_run(options.out, result_files(ActivationPatching), options.overwrite)
    names = (
        "n",
        "sites",
        "positions",
        "directions",
        "metric",
        "controls",
        "scores",
        "batch_rows",
        "path",
        "seed",
        "overwrite",
    )
    how = options.named(*names) | {"layers": options.layers or None, "folder": options.out}
    return options.measure(
        "patching", "row", activation_patching, options.load_model(), options.pairs or options.task, **how
    )


def run() -> None:
    """The command line of `scripts/activation_patching.py`."""
    command.run(ActivationPatchingOptions, main)
