"""`faithfulness`: does a circuit carry the whole effect? All else ablated, and the circuit itself, beside random circuits of its size."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from numpy import ndarray
from torch import Tensor

from diagnostics.edges.design import read_sites
from diagnostics.edges.from_edges import circuit_of
from diagnostics.edges.result import EdgePatching
from diagnostics.edges.work import merged
from diagnostics.pairs.measured import METRICS, metric_of, metric_of_run
from diagnostics.pairs.pair import Pairs, labels
from diagnostics.pairs.read import pairs_from
from diagnostics.pairs.shares import share_of_sums
from diagnostics.results.calls import recorded
from diagnostics.results.headlines import Headline
from diagnostics.results.result import Result
from diagnostics.running.joint_edits import measure_members
from diagnostics.running.provenance import run_identity, run_provenance
from diagnostics.running.units import Tick, Unit, narrowed, run_table
from diagnostics.sampling.tokens import generator
from diagnostics.statistics.tables import lines_of
from interventions.errors import ResultError
from interventions.models.causal_model import CausalModel
from interventions.models.wrapping import wrap
from interventions.progress import Progressing
from interventions.recording import record
from interventions.sites import Site, several

ABLATE = ("corrupt", "mean")
"""corrupt: what stands there in the pair's corrupt run, at every position from the first differing token on. mean: the mean over the
corrupt prompts of the pair's pool at the position of the same label, at every position."""
EDITS = ("keep", "remove")
"""In the clean run. keep: everything of the scope outside the circuit is ablated. remove: the circuit is."""
SCOPE = ("z", "mlp_out")
CIRCUIT, NOTHING = 0, -1
"""In the column `circuit`: the circuit itself, and the empty one (all ablated); 1, 2, …: random ones."""
_TIE = 1e-4
"""shares this close count as equal: one circuit measured twice differs by rounding"""
_PAIRS = 8
"""pairs in a unit of work"""


@dataclass(frozen=True)
class Faithfulness(Result):
    """What a circuit alone keeps of the metric, and what is lost without it. The table has a line for each pair × edit × circuit:
    m, m_clean, m_corrupt, effect (keep: m − m_corrupt; remove: m_clean − m), total = m_clean − m_corrupt."""

    NAME: ClassVar[str] = "faithfulness"
    TITLE: ClassVar[str] = "Faithfulness of a circuit"
    QUESTION: ClassVar[str] = "Does a circuit carry all of what differs between two prompts, and does nothing else?"
    NOTE: ClassVar[str] = (
        "share: Σ effect / Σ (m_clean − m_corrupt) over pairs, with a 95 % interval over pairs. keep: all but the circuit ablated (1: it "
        "suffices); remove: the circuit ablated (1: without it nothing is left). random: circuits of the same size, drawn uniformly; "
        "p: share of them, this one included, that do as well or better. nothing_kept: everything of the scope ablated."
    )

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """A line for each edit: the circuit's share, and those of random circuits."""
        found = []
        for edit in EDITS:
            some: Any = lines_of(self.frame, edit=edit)
            sums = some.groupby("circuit")[["effect", "total"]].sum()
            shares = sums["effect"] / sums["total"]
            own = some[some["circuit"] == CIRCUIT]
            null = shares[shares.index > CIRCUIT].to_numpy(float)
            share = share_of_sums(own["effect"].to_numpy(float), own["total"].to_numpy(float))
            found.append({
                "edit": edit, "components": len(self.provenance["circuit"]), "pairs": len(own), "share": share,
                "random_median": float(np.median(null)) if len(null) else np.nan,
                "random_max": float(null.max()) if len(null) else np.nan,
                "random_circuits": len(null), "p": float((1 + (null >= share.value - _TIE).sum()) / (1 + len(null))),
                "nothing_kept": float(shares[NOTHING]) if edit == "keep" else np.nan,
            })  # fmt: skip
        return found

    def headlines(self) -> Iterable[Headline]:
        """What the circuit keeps alone, and what is lost without it, beside random circuits."""
        for g in self.groups:
            what = {"keep": "share kept by the circuit alone", "remove": "share lost without the circuit"}[g["edit"]]
            yield Headline(what, str(g["share"]), f"median of random circuits of its size: {g['random_median']:.3g}")

    def plot(self) -> Any:
        """The circuit's shares beside those of random circuits. Returns a matplotlib Figure."""
        from diagnostics.edges.figures import plot_faithfulness

        shares = {}
        for edit in EDITS:
            some = self.frame[(self.frame["edit"] == edit) & (self.frame["circuit"] > CIRCUIT)]
            sums = some.groupby("circuit")[["effect", "total"]].sum()
            shares[edit] = (sums["effect"] / sums["total"]).to_numpy(float)
        return plot_faithfulness(self.groups, shares, self.provenance)


@recorded
@torch.no_grad()
def faithfulness(
    model: Any,
    pairs: Pairs | str | Path | Sequence[Any],
    circuit: Sequence[Any] | EdgePatching,
    *,
    scope: str | Sequence[str] = ("z",),
    ablate: str = "corrupt",
    n_random: int = 20,
    metric: str = "logit_difference",
    n: int | None = None,
    seed: int = 0,
    path: str = "auto",
    batch_rows: int | None = None,
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Progressing = None,
) -> Faithfulness:
    """Ablate, in the clean run, everything outside a circuit (`keep`), then the circuit itself (`remove`).

        keep    share kept = Σ (m − m_corrupt) / Σ (m_clean − m_corrupt)        1: the circuit is enough
        remove  share lost = Σ (m_clean − m)   / Σ (m_clean − m_corrupt)        1: nothing else can do it

    pairs, n: as for `activation_patching`. circuit: heads (`(9, 6)`, `"9.z.6"`) and, where `scope` has `mlp_out`, MLPs
    (`(9, "mlp_out")`); or the result of `edge_patching`: both ends of its edges that beat their controls, as far as they are in the scope
    (see `circuit_of`; others are counted in provenance). scope: what is ablated: every head (`z`), every MLP (`mlp_out`) or both, at all positions. ablate: `corrupt`, the values
    of the pair's corrupt run, or `mean`, their mean over the corrupt prompts of the pair's pool at the position of the same label;
    pairs whose pool has no other pair are then left out and counted. n_random: random circuits with as many heads and MLPs, drawn
    by `seed`. Each ablated component keeps its value whatever the others do; what is not ablated is computed anew from what reaches it.

    Source: faithfulness and completeness as in arXiv:2211.00593 (mean ablation) and arXiv:2304.05969 (resampling); the null is ours.
    Raises `TextError` for pairs that cannot be used, `SiteError` for heads that the model lacks, `ResultError` for other settings.
    """
    model = wrap(model)
    scope = several(scope)
    for name, given, known in (
        ("ablate", ablate, ABLATE),
        ("metric", metric, METRICS),
        *(("scope", s, SCOPE) for s in scope),
    ):
        if given not in known:
            raise ResultError(f"{name} {given!r}; known: {', '.join(known)}")
    if n_random < 0 or not scope:
        raise ResultError(
            f"{n_random} random circuits, scope {list(scope)}; expected 0 or more, and z, mlp_out or both"
        )
    everything = read_sites(model, tuple(scope), SCOPE, "z")
    left_out: list[str] = []
    if isinstance(circuit, EdgePatching):
        circuit, left_out = circuit_of(model, circuit, scope)
    chosen = read_sites(model, circuit, SCOPE, "z")
    if outside := [str(site) for site in chosen if site not in everything]:
        raise ResultError(
            f"{outside[0]} is in the circuit but not in the scope ({', '.join(scope)}); add its point to scope"
        )
    found = pairs_from(model, pairs, n=n, seed=seed)
    runner = _CircuitRunner(model, found, everything, _circuits(everything, chosen, n_random, seed), ablate, metric)
    runner.how = {"path": path, "batch_rows": batch_rows}
    own = {
        "circuit": [str(s) for s in chosen], "scope": list(scope), "ablate": ablate, "metric": metric, "n_random": n_random,
        "seed": seed, "path_asked": path, "batch_rows": batch_rows,
    }  # fmt: skip
    identity = run_identity(Faithfulness.NAME, model, {"pairs": found.sha256}, own)
    frame, notes = run_table(
        runner.units(), folder, runner, merged, identity=identity, overwrite=overwrite, progress=progress
    )
    dropped = dict(found.left_out) | runner.alone
    provenance = run_provenance(
        Faithfulness.NAME, model, {"pairs": found.description}, chosen,
        own | {"rows": len(frame), "pairs_dropped": dropped, "circuit_left_out": len(left_out), **notes},
    )  # fmt: skip
    return Faithfulness(frame, found.clean + found.corrupt, provenance)


def _circuits(everything: Sequence[Site], chosen: Sequence[Site], n: int, seed: int) -> Bool[ndarray, "circuit site"]:
    """The circuit, then random ones with as many components at each point."""
    found = np.zeros((1 + n, len(everything)), dtype=bool)
    found[0] = [site in set(chosen) for site in everything]
    for i in range(1, 1 + n):
        draw = generator(seed, "faithfulness", i)
        for point in dict.fromkeys(site.point for site in everything):
            own = np.flatnonzero([site.point == point for site in everything])
            found[i, own[torch.randperm(len(own), generator=draw)[: found[0, own].sum()].numpy()]] = True
    return found


class _CircuitRunner:
    """Computes units, a few pairs each."""

    how: dict[str, Any]

    def __init__(
        self, model: CausalModel, pairs: Pairs, sites: Sequence[Site], circuits: ndarray, ablate: str, metric: str
    ):
        self.model, self.pairs, self.sites, self.metric, self.ablate = model, pairs, sites, metric, ablate
        self.whole = list(dict.fromkeys(site.whole for site in sites))
        self.lines = [("keep", NOTHING), *((edit, i) for edit in EDITS for i in range(len(circuits)))]
        inside = np.concatenate([~np.zeros_like(circuits[:1]), ~circuits, circuits])
        self.member: Bool[ndarray, "line site"] = inside
        """what each line ablates"""
        self.which = list(range(len(pairs)))
        self.alone: dict[str, int] = {}
        self.means: dict[tuple[str, str], dict[Site, Tensor]] = {}
        if ablate == "mean":
            self._average()

    def units(self) -> list[Unit]:
        parts = range(0, len(self.which), _PAIRS)
        return [Unit.of(rows=len(self.which[at : at + _PAIRS]) * len(self.lines), pairs=at // _PAIRS) for at in parts]

    def _average(self) -> None:
        pools = self.pairs.pools
        self.which = [i for i in self.which if pools.count(pools[i]) > 1]
        if lost := len(self.pairs) - len(self.which):
            self.alone["no other pair in its pool to average over"] = lost
        if not self.which:
            raise ResultError(
                "no two pairs pool, so no mean can be formed; give pairs with roles, or use ablate='corrupt'"
            )
        counts: dict[tuple[str, str], int] = {}
        for start in range(0, len(self.which), _PAIRS):
            some = self.which[start : start + _PAIRS]
            run = record(self.model, [self.pairs.corrupt[i] for i in some], self.whole, keep_cache=False)
            for row, i in enumerate(some):
                for position, label in enumerate(labels(self.pairs[i])):
                    key = pools[i], label
                    n = counts[key] = counts.get(key, 0) + 1
                    known = self.means.setdefault(key, {})
                    for site in self.whole:
                        x = run.of(site)[row, position].float()
                        known[site] = x if n == 1 else known[site] + (x - known[site]) / n

    def __call__(self, unit: Unit, tick: Tick) -> tuple[pd.DataFrame, dict[str, Any]]:
        at = unit["pairs"] * _PAIRS
        which = self.which[at : at + _PAIRS]
        prompts = [getattr(self.pairs, run)[i] for run in ("clean", "corrupt") for i in which]
        clean = record(self.model, prompts[: len(which)], self.whole)
        corrupt = record(self.model, prompts[len(which) :], self.whole)
        m_clean, m_corrupt = (metric_of_run(run, self.pairs, which, self.metric) for run in (clean, corrupt))
        notes: dict[str, Any] = {"rows_dropped": {}}
        parts = []
        for row, i in enumerate(which):
            length = len(self.pairs[i])
            start = int(self.pairs.first_difference[i]) if self.ablate == "corrupt" else 0
            position = np.arange(start, length)
            vectors = [self._value(site, corrupt, row, i, start) for site in self.sites]
            metric = metric_of(self.pairs, i, self.metric)
            m = measure_members(
                clean, row, self.sites, vectors, position, self.member, metric, m_clean[row], notes,
                progress=tick, **self.how,
            )  # fmt: skip
            edit, circuit = zip(*self.lines, strict=True)
            parts.append(
                pd.DataFrame(
                    {
                        "pair": i,
                        "edit": edit,
                        "circuit": circuit,
                        "m": m,
                        "m_clean": m_clean[row],
                        "m_corrupt": m_corrupt[row],
                    }
                )
            )
        frame: Any = pd.concat(parts, ignore_index=True)
        frame["effect"] = np.where(
            frame["edit"] == "keep", frame["m"] - frame["m_corrupt"], frame["m_clean"] - frame["m"]
        )
        frame["total"] = frame["m_clean"] - frame["m_corrupt"]
        finite = np.isfinite(frame["m"].to_numpy())
        if not finite.all():
            notes["rows_dropped"] = {"metric not finite": int((~finite).sum())}
        return narrowed(frame[finite].reset_index(drop=True)), notes

    def _value(self, site: Site, corrupt: Any, row: int, i: int, start: int) -> Tensor:
        """What a component is set to, `[token, width]`."""
        if self.ablate == "corrupt":
            return corrupt.of(site)[row, start : len(self.pairs[i])]
        pool = self.pairs[i].pool
        whole = torch.stack([self.means[pool, label][site.whole] for label in labels(self.pairs[i])])
        like = corrupt.of(site)
        width = like.shape[-1]
        return (whole if site.head is None else whole[:, site.head * width : (site.head + 1) * width]).to(like.dtype)
