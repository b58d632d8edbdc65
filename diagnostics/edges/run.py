"""`edge_patching`: one head's or MLP's changed output shown to one receiver alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diagnostics.edges.design import settings_of
from diagnostics.edges.result import EdgePatching
from diagnostics.edges.work import EdgeRunner, merged
from diagnostics.pairs.differences import FLOOR
from diagnostics.pairs.pair import Pairs
from diagnostics.pairs.read import pairs_from
from diagnostics.results.calls import recorded
from diagnostics.running.provenance import run_identity, run_provenance
from diagnostics.running.units import run_table
from interventions.models.wrapping import wrap
from interventions.progress import Progressing


@recorded
@torch.no_grad()
def edge_patching(
    model: Any,
    pairs: Pairs | str | Path | Sequence[Any],
    *,
    receivers: Any,
    senders: Any = None,
    positions: str | Mapping[str, str] = "all",
    directions: str | Sequence[str] = ("denoise", "noise"),
    mlps: str = "frozen",
    later: str = "run",
    metric: str = "logit_difference",
    controls: int = 1,
    n: int | None = None,
    floor: float = FLOOR,
    seed: int = 0,
    path: str = "auto",
    batch_rows: int | None = None,
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> EdgePatching:
    """Show one receiver what one sender writes in the other run of a pair, all else as in the base run, and measure how far m moves, beside
    matched controls.

        x′ = x + Δ_sender → the receiver's q, k, v or output anew → everything above it runs on
        denoise  the corrupt run, Δ = clean − corrupt write:   effect = m − m_corrupt
        noise    the clean run, Δ = corrupt − clean write:     effect = m_clean − m
        control  Δ = ‖Δ_sender‖·(a − b)/‖a − b‖ at each token, a, b: what the sender writes in the clean runs of two other pairs
        share of an edge = Σ effect / Σ (m_clean − m_corrupt) over pairs

    pairs, n, floor: as for `activation_patching`. senders (None: all): `embedding`, `z` (every head), `mlp_out` (every MLP), or single
    ones: `Site(3, "z", head=1)`, `"3.z.1"`, `(3, 1)`; `Site(3, "mlp_out")`. receivers: `q`, `k`, `v` (every head; of k and v the model's own,
    which queries may share), `mlp_out`, `logits`, or single ones: `"12.q.3"`, `(12, 3, "q")`, `"12.mlp_out"`. positions: the receiver sees the
    change at `all` positions at once, at the `last` alone, or at `each` in turn; or one of these by the receiver's point, such as
    {"q": "last", "v": "all"}. The logits read the last position: the sender's direct effect, through the final norm. mlps: `frozen`, or
    `recomputed`: the change also passes through the MLPs on the way, attention frozen. Both are in use: arXiv:2211.00593 recomputes them.
    later: `run`: everything above the receiver runs on from what it makes of the change; `frozen` (direct only): only what the receiver
    itself writes at the last position reaches the logits, all that is written above it stays as in the base run.
    A head's write is Δz·W_O; under a post-norm (Gemma, OLMo) the change of attn_out where that head's z alone changes. In blocks
    with attention and MLP side by side a head has no edge to its own block's MLP. metric: `logit_difference` (right − wrong) or
    `probability` of the right answer, at the last position. controls: rows beside each edge whose sender writes as much along the difference
    of two other pairs at the same label (under a post-norm: the change of attn_out where that head's z moves by their difference); edges
    without two others are counted in provenance `rows_dropped`. seed: of drawn pairs and controls. folder: where finished units, four pairs each, are kept.

    Source: path patching (arXiv:2211.00593, arXiv:2304.05969), here for all senders and receivers of a block at once.
    Raises `TextError` for pairs that cannot be used, `SiteError` for a site or head that the model lacks and for a block that gives a
    token alone other values than in its prompt, `ResultError` for other settings.
    """
    model = wrap(model)
    settings = settings_of(
        model, senders, receivers, positions, directions, metric, mlps, later, controls, seed, path, batch_rows
    )
    chosen = pairs_from(model, pairs, n=n, seed=seed, floor=floor)
    runner = EdgeRunner(model, chosen, settings)
    own = settings.as_dict()
    identity = run_identity(EdgePatching.NAME, model, {"pairs": chosen.sha256}, own)
    frame, notes = run_table(
        runner.units(), folder, runner, merged, identity=identity, overwrite=overwrite, progress=progress
    )
    counts = {"rows": len(frame), "rows_run": int(frame["run"].sum()), "pools": list(dict.fromkeys(chosen.pools))}
    provenance = run_provenance(
        EdgePatching.NAME, model, {"pairs": chosen.description}, settings.receivers,
        own | counts | {"pairs_dropped": dict(chosen.left_out), **notes},
    )  # fmt: skip
    return EdgePatching(frame, chosen.clean + chosen.corrupt, provenance)
