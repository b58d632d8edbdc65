"""What can send and what can receive, how they are named, and which edges there are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diagnostics.pairs.measured import METRICS
from interventions.errors import ResultError
from interventions.models.anatomy import check_site, n_heads, side_by_side
from interventions.models.causal_model import CausalModel
from interventions.sites import HEADS, Site, several

DIRECTIONS = ("denoise", "noise")
"""denoise: the corrupt run, into which a sender writes as in the clean one. noise: the clean run, into which it writes as in the corrupt one."""
POSITIONS = ("all", "last", "each")
"""all: the receiver sees the change at all positions at once. last: at the last one alone. each: one position after another."""
MLPS = ("frozen", "recomputed")
"""frozen: MLPs between sender and receiver stay as in the base run. recomputed: they see the sender's change too (arXiv:2211.00593)."""
LATER = ("run", "frozen")
"""run: everything above the receiver runs on from what it makes of the change. frozen: only what the receiver itself writes at the last
position reaches the logits; all that is written above it stays as in the base run (direct only)."""
EMBEDDING, LOGITS = "embedding", "logits"
EMBEDDED = Site(0, "resid_pre")
"""The embedding as a sender: what the first block reads."""
SENDERS = (EMBEDDING, "z", "mlp_out")
RECEIVERS = ("q", "k", "v", "mlp_out", LOGITS)
_PAIRS = 4
"""pairs in a unit of work"""


@dataclass(frozen=True)
class Settings:
    """What is asked of each pair. Senders and receivers are sites: a head sends at its `z`, an MLP at `mlp_out`, the embedding at the
    first `resid_pre`; a head receives at `q`, `k` or `v`, an MLP at `mlp_out`, the logits at the last `resid_post`."""

    senders: tuple[Site, ...]
    """in the order in which a pass reaches them"""
    receivers: tuple[Site, ...]
    positions: Mapping[str, str]
    """point of the receiver -> one of `POSITIONS`"""
    directions: tuple[str, ...]
    metric: str
    mlps: str
    later: str
    controls: int
    seed: int
    path: str
    batch_rows: int | None

    def as_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        kept = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return kept | {name: [str(site) for site in kept[name]] for name in ("senders", "receivers")}


def settings_of(
    model: CausalModel,
    senders: Sequence[Any] | None,
    receivers: Any,
    positions: str | Mapping[str, str],
    directions: str | Sequence[str],
    metric: str,
    mlps: str,
    later: str,
    controls: int,
    seed: int,
    path: str,
    batch_rows: int | None,
) -> Settings:
    """Arguments checked, names read. Raises `ResultError`, and `SiteError` for what the model lacks."""
    directions = several(directions)
    said = dict(positions) if isinstance(positions, Mapping) else dict.fromkeys(RECEIVERS, positions)
    for name, given, known in (
        *(("directions", d, DIRECTIONS) for d in directions),
        ("metric", metric, METRICS),
        ("mlps", mlps, MLPS),
        ("later", later, LATER),
        *(("positions of a receiver at", point, RECEIVERS) for point in said),
        *(("positions", p, POSITIONS) for p in said.values()),
    ):
        if given not in known:
            raise ResultError(f"{name} {given!r}; known: {', '.join(known)}")
    if not directions or controls < 0:
        raise ResultError(f"{len(directions)} directions, {controls} controls; expected 1 and 0 or more")
    chosen = read_sites(model, SENDERS if senders is None else senders, SENDERS, "z")
    wanted = read_sites(model, receivers, RECEIVERS, None)
    if not any(reaches(model, s, r) for s in chosen for r in wanted):
        raise ResultError("no sender stands before a receiver; name senders of earlier blocks")
    for layer in sorted({site.layer for site in (*chosen, *wanted)}):
        check_site(model, Site(layer, "attn_out"))
    said = {point: said.get(point, "all") for point in RECEIVERS} | {LOGITS: "last"}
    every = tuple(dict.fromkeys(directions))
    return Settings(chosen, wanted, said, every, metric, mlps, later, controls, seed, path, batch_rows)


def read_sites(
    model: CausalModel, given: Any, known: tuple[str, ...], of_head: str | None, *, split: bool = True
) -> tuple[Site, ...]:
    """Sites of names, each once, in the order in which a pass reaches them.

    known: points that may be named; the name of a point alone stands for all of its heads or blocks. of_head: the point that
    (layer, head) stands for. split: a site of all heads of a block stands for each of them. Raises `ResultError` for what is no
    name, and `SiteError` for what the model lacks.
    """
    many = isinstance(given, (list, tuple, set, frozenset)) and not _is_single(given)
    named = [site for one in (given if many else [given]) for site in _read(model, one, known, of_head, split)]
    if not named:
        raise ResultError(f"nothing named; expected some of {', '.join(known)}, or sites")
    return tuple(sorted(dict.fromkeys(named), key=lambda site: (*site.rank, -1 if site.head is None else site.head)))


def _is_single(given: Any) -> bool:
    """Whether this is one (layer, head), (layer, point) or (layer, head, point)."""
    return isinstance(given, tuple) and len(given) > 1 and isinstance(given[0], int)


def _read(model: CausalModel, one: Any, known: tuple[str, ...], of_head: str | None, split: bool) -> list[Site]:
    last = Site(model.n_layers - 1)
    if isinstance(one, str) and one in (EMBEDDING, LOGITS) and one in known:
        return [EMBEDDED if one == EMBEDDING else last]
    if isinstance(one, str) and one in known:
        return [s for layer in range(model.n_layers) for s in _split(model, Site(layer, one))]
    site = Site.parse(one) if isinstance(one, str) else one
    if _is_single(one):
        rest: list[Any] = list(one)
        layer = rest.pop(0)
        point = rest.pop() if isinstance(rest[-1], str) else of_head
        if point is not None and all(isinstance(x, int) for x in rest) and len(rest) < 2:
            site = Site(layer, point, head=rest[0] if rest else None)
    ends = {EMBEDDED: EMBEDDING, last: LOGITS}
    if not isinstance(site, Site) or (site.point not in known and ends.get(site) not in known):
        raise ResultError(
            f"{one!r}; expected one of {', '.join(known)}, or such a site by layer and head: Site(12, 'q', head=3), '12.q.3'"
        )
    check_site(model, site)
    return _split(model, site) if split else [site]


def _split(model: CausalModel, site: Site) -> list[Site]:
    """Each head of a site of all heads."""
    check_site(model, site)
    if site.point not in HEADS or site.head is not None:
        return [site]
    return [Site(site.layer, site.point, head=head) for head in range(n_heads(model, site))]


def name_of(site: Site, *, receives: bool = False) -> str:
    """`embedding`, `logits`, or the site's own name, such as `12.q.3`."""
    if receives:
        return LOGITS if site.point == "resid_post" else str(site)
    return EMBEDDING if site == EMBEDDED else str(site)


def reaches(model: CausalModel, sender: Site, receiver: Site) -> bool:
    """Whether a receiver reads what a sender writes. Where attention and MLP stand side by side, no head is read by its own block's MLP."""
    if sender == EMBEDDED or receiver.point == "resid_post" or sender.layer != receiver.layer:
        return sender.layer <= receiver.layer
    return sender.point == "z" and receiver.point == "mlp_out" and not side_by_side(model, sender.layer)


def batches(n: int) -> list[list[int]]:
    """Pairs of each unit of work."""
    return [list(range(start, min(start + _PAIRS, n))) for start in range(0, n, _PAIRS)]
