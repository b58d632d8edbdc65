"""Show one head or MLP what another writes in the other run of a pair, all else unchanged."""

from dataclasses import dataclass
from typing import Literal

from diagnostics.commands import command
from diagnostics.commands.inputs import PairOptions
from diagnostics.commands.ranges import NonNegativeInt


@dataclass(frozen=True, kw_only=True)
class EdgePatchingOptions(PairOptions):
    """Which head or MLP tells which other one what differs between two prompts?

    Each edge goes from a sender (the embedding, a head, an MLP) to a receiver (a head through q, k or v, an MLP, the logits).
    The receiver alone sees what the sender writes in the other run of the pair; in its control the sender writes as much along
    the difference of two other pairs. Writes a table (Parquet), the pairs' tokens, a summary with provenance (JSON), a matrix and
    a graph of the strongest edges into --out.

    Examples:
      scripts/edge_patching.py --task ioi --n 20 --receivers 20.v.0 24.q.4 --out results/edges
      scripts/edge_patching.py --pairs my_pairs.csv --receivers logits --out results/direct
    """

    receivers: tuple[str, ...] = ("logits",)
    """q, k, v (every head), mlp_out, logits, or single ones such as 12.q.3 and 12.mlp_out"""
    senders: tuple[str, ...] = ()
    """embedding, z (every head), mlp_out, or single ones such as 3.z.1 (default: all)"""
    positions: Literal["all", "last", "each"] = "all"
    """where the receiver sees the change: at all positions at once, at the last alone, or at each in turn"""
    directions: tuple[Literal["denoise", "noise"], ...] = ("denoise", "noise")
    """denoise: clean into corrupt; noise: corrupt into clean"""
    mlps: Literal["frozen", "recomputed"] = "frozen"
    """recomputed: the change also passes through the MLPs on the way, as in arXiv:2211.00593"""
    later: Literal["run", "frozen"] = "run"
    """frozen: only what the receiver itself writes reaches the logits, later writes stay as in the base run"""
    controls: NonNegativeInt = 1
    """controls of each edge"""


def main(options: EdgePatchingOptions) -> command.Document:
    """Run the command."""
    from diagnostics.edges.result import EdgePatching
    from diagnostics.edges.run import edge_patching
    from diagnostics.results.result import result_files

    options.check(result_files(EdgePatching))
    own = options.named("receivers", "positions", "directions", "mlps", "later", "controls")
    how = options.common() | own | {"senders": options.senders or None}
    model = options.load_model()
    return options.measure("patching edges", "row", edge_patching, model, options.pairs or options.task, **how)


def run() -> None:
    """The command line of `scripts/edge_patching.py`."""
    command.run(EdgePatchingOptions, main)
