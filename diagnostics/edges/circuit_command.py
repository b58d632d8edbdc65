"""Ablate everything outside a circuit, then the circuit itself, beside random circuits of the same size."""

from dataclasses import dataclass
from typing import Literal

from diagnostics.commands import command
from diagnostics.commands.inputs import PairOptions
from diagnostics.commands.ranges import NonNegativeInt
from interventions.errors import ResultError
from interventions.sites import Site


@dataclass(frozen=True, kw_only=True)
class FaithfulnessOptions(PairOptions):
    """Does a circuit carry all of what differs between two prompts, and does nothing else?

    In the clean run of each pair everything outside the circuit is ablated (keep), then the circuit itself (remove); the same for
    random circuits of its size. Writes a table (Parquet), the pairs' tokens, a summary with provenance (JSON), and a figure into
    --out.

    Examples:
      scripts/faithfulness.py --task ioi --n 20 --circuit 17.z.4 20.z.0 23.z.3 --out results/circuit
      scripts/faithfulness.py --edges results/edges --scope z mlp_out --seed 1 --out results/from_edges
    """

    circuit: tuple[str, ...] = ()
    """heads such as 20.z.0 and, with --scope z mlp_out, MLPs such as 17.mlp_out"""
    edges: str | None = None
    """in place of --circuit: the --out of mechdiag edge-patching; both ends of the edges that beat their controls"""
    scope: tuple[Literal["z", "mlp_out"], ...] = ("z",)
    """what is ablated: every head (z), every MLP (mlp_out), or both"""
    ablate: Literal["corrupt", "mean"] = "corrupt"
    """to the pair's corrupt run, or to the mean over the corrupt prompts at the same label"""
    n_random: NonNegativeInt = 20
    """random circuits"""


def main(options: FaithfulnessOptions) -> command.Document:
    """Run the command."""
    from diagnostics.edges.circuits import Faithfulness, faithfulness
    from diagnostics.edges.result import EdgePatching
    from diagnostics.results.result import result_files

    if bool(options.circuit) == bool(options.edges):
        raise ResultError("expected --circuit or --edges, and not both")
    for name in options.circuit:
        Site.parse(name)
    options.check(result_files(Faithfulness))
    circuit = EdgePatching.load(options.edges) if options.edges else options.circuit
    how = options.common() | options.named("scope", "ablate", "n_random")
    model, pairs = options.load_model(), options.pairs or options.task
    return options.measure("ablating circuits", "row", faithfulness, model, pairs, circuit, **how)


def run() -> None:
    """The command line of `scripts/faithfulness.py`."""
    command.run(FaithfulnessOptions, main)
