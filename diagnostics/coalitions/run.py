"""`shapley`: what each of several components contributes to what they do together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diagnostics.coalitions.design import EXACT, EXACT_ALONE
from diagnostics.coalitions.result import Shapley
from diagnostics.coalitions.work import CoalitionRunner, merged
from diagnostics.edges.design import DIRECTIONS, read_sites
from diagnostics.pairs.measured import METRICS
from diagnostics.pairs.pair import Pairs
from diagnostics.pairs.read import pairs_from
from diagnostics.results.calls import recorded
from diagnostics.running.provenance import run_identity, run_provenance
from diagnostics.running.units import run_table
from interventions.errors import ResultError
from interventions.models.wrapping import wrap
from interventions.progress import Progressing
from interventions.sites import INSIDE, POINTS

POSITIONS = ("last", "all")
"""last: components are patched at the last position alone. all: at every position from the first differing token on."""
_POINTS = tuple(point for point in (*POINTS, *INSIDE) if point != "pattern")


@recorded
@torch.no_grad()
def shapley(
    model: Any,
    pairs: Pairs | str | Path | Sequence[Any],
    components: Sequence[Any],
    *,
    positions: str = "all",
    direction: str = "denoise",
    orders: int | None = None,
    metric: str = "logit_difference",
    n: int | None = None,
    seed: int = 0,
    path: str = "auto",
    batch_rows: int | None = None,
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> Shapley:
    """Patch every coalition of some components from one run of a pair into the other, and divide the joint effect among them.

        v(S) = m(S patched) − m_corrupt (denoise), m_clean − m(S patched) (noise)
        φ_i = Σ_S s!(n−s−1)!/n!·(v(S∪i) − v(S)),   I_ij = Σ_S s!(n−s−2)!/(n−1)!·(v(S∪ij) − v(S∪i) − v(S∪j) + v(S)),   s = |S|

    pairs, n: as for `activation_patching`. components: heads (`(9, 6)`, `"9.z.6"`, `Site(9, "z", head=6)`), MLPs (`(9, "mlp_out")`) or
    other sites but `pattern` (without a head: all heads of the block as one). positions: patched at `all` positions from the first differing token on, or at the `last` alone.
    orders: None runs all 2ⁿ coalitions, up to 10 components, up to 16 of a single pair; a number samples as many orders in which the
    components join (each with its reverse, hence rounded up to even), with an interval over orders and no interactions. seed: of orders.

    A patched component keeps its value whatever the others do. Source: Shapley 1953; interaction index of Grabisch & Roubens 1999.
    Raises `TextError` for pairs that cannot be used, `SiteError` for sites that the model lacks, `EditError` for components of which one
    leaves another without effect (a head's z and attn_out), `ResultError` for other settings and for too many components.
    """
    model = wrap(model)
    for name, given, known in (
        ("positions", positions, POSITIONS),
        ("direction", direction, DIRECTIONS),
        ("metric", metric, METRICS),
    ):
        if given not in known:
            raise ResultError(f"{name} {given!r}; known: {', '.join(known)}")
    chosen = read_sites(model, components, _POINTS, "z", split=False)
    found = pairs_from(model, pairs, n=n, seed=seed)
    most = EXACT_ALONE if len(found) == 1 else EXACT
    if len(chosen) < 2:
        raise ResultError(f"{len(chosen)} component; expected 2 or more")
    if orders is None and len(chosen) > most:
        raise ResultError(
            f"{len(chosen)} components have {2 ** len(chosen):,} coalitions; at most {EXACT} ({EXACT_ALONE} of a single pair) are run "
            "exactly; give fewer, or orders=200 to sample"
        )
    if orders is not None and orders < 4:
        raise ResultError(f"{orders} orders; expected 4 or more, for an interval")
    orders = None if orders is None else orders + orders % 2
    how = {"path": path, "batch_rows": batch_rows}
    runner = CoalitionRunner(model, found, chosen, positions, direction, metric, orders, seed, how)
    own = {
        "components": [str(site) for site in chosen], "positions": positions, "direction": direction, "orders": orders,
        "metric": metric, "seed": seed, "path_asked": path, "batch_rows": batch_rows,
    }  # fmt: skip
    identity = run_identity(Shapley.NAME, model, {"pairs": found.sha256}, own)
    frame, notes = run_table(
        runner.units(), folder, runner, merged, identity=identity, overwrite=overwrite, progress=progress
    )
    provenance = run_provenance(
        Shapley.NAME, model, {"pairs": found.description}, chosen,
        own | {"rows": len(frame), "pairs_dropped": dict(found.left_out), **notes},
    )  # fmt: skip
    return Shapley(frame, found.clean + found.corrupt, provenance)
