"""What can send and what can receive, how they are named, and which edges there are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diagnostics.pairs.measured import METRICS
from interventions.errors import ResultError
from interventions.models.anatomy import check_site, n_heads, side_by_side
from interventions.models.causal_model import CausalModel
from interventions.sites import Site

DIRECTIONS = ("denoise", "noise")
"""denoise: the corrupt run, into which a sender writes as in the clean one. noise: the clean run, into which it writes as in the corrupt one."""
POSITIONS = ("all", "last", "each")
"""all: the receiver sees the change at all positions at once. last: at the last one alone. each: one position after another."""
MLPS = ("frozen", "recomputed")
"""frozen: MLPs between sender and receiver stay as in the base run. recomputed: they see the sender's change too (arXiv:2211.00593)."""
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
    directions: Sequence[str],
    metric: str,
    mlps: str,
    path: str = "auto",
    batch_rows: int | None = None,
) -> Settings:
    """Arguments checked, names read. Raises `ResultError`, and `SiteError` for what the model lacks."""
    said = dict(positions) if isinstance(positions, Mapping) else dict.fromkeys(RECEIVERS, positions)
    for name, given, known in (
        *(("directions", d, DIRECTIONS) for d in directions),
        ("metric", metric, METRICS),
        ("mlps", mlps, MLPS),
        *(("positions of a receiver at", point, RECEIVERS) for point in said),
        *(("positions", p, POSITIONS) for p in said.values()),
    ):
        if given not in known:
            raise ResultError(f"{name} {given!r}; known: {', '.join(known)}")
    if not directions:
        raise ResultError("no directions; expected 'denoise', 'noise' or both")
    chosen = read_sites(model, SENDERS if senders is None else senders, SENDERS, "z")
    wanted = read_sites(model, receivers, RECEIVERS, None)
    if not any(reaches(model, s, r) for s in chosen for r in wanted):
        raise ResultError("no sender stands before a receiver; name senders of earlier blocks")
    for layer in sorted({site.layer for site in (*chosen, *wanted)}):
        check_site(model, Site(layer, "attn_out"))
    said = {point: said.get(point, "all") for point in RECEIVERS} | {LOGITS: "last"}
    return Settings(chosen, wanted, said, tuple(dict.fromkeys(directions)), metric, mlps, path, batch_rows)


def read_sites(model: CausalModel, given: Any, known: tuple[str, ...], of_head: str | None) -> tuple[Site, ...]:
    """Sites of names, in the order in which a pass reaches them. of_head: the point that (layer, head) stands for."""
    several = isinstance(given, (list, tuple)) and not (given and isinstance(given[0], int))
    found = dict.fromkeys(site for one in (given if several else [given]) for site in _read(model, one, known, of_head))
    if not found:
        raise ResultError(f"nothing named; expected some of {', '.join(known)}, or sites")
    return tuple(sorted(found, key=lambda site: (*site.rank, -1 if site.head is None else site.head)))


def _read(model: CausalModel, one: Any, known: tuple[str, ...], of_head: str | None) -> list[Site]:
    last = Site(model.n_layers - 1)
    if isinstance(one, str) and one in known:
        if one in (EMBEDDING, LOGITS):
            return [EMBEDDED if one == EMBEDDING else last]
        every = [Site(layer, one) for layer in range(model.n_layers)]
        for site in every:
            check_site(model, site)
        if one == "mlp_out":
            return every
        return [Site(site.layer, one, head=h) for site in every for h in range(n_heads(model, site))]
    if isinstance(one, tuple) and len(one) in (2, 3) and all(isinstance(x, int) for x in one[: len(one) - 1]):
        layer, *rest = one
        point = rest[-1] if isinstance(rest[-1], str) else of_head
        if point is not None and all(isinstance(x, int) for x in rest[: len(rest) - isinstance(rest[-1], str)]):
            heads = [x for x in rest if isinstance(x, int)]
            one = Site(layer, point, head=heads[0] if heads else None)
    site = Site.parse(one) if isinstance(one, str) else one
    ends = {EMBEDDED if EMBEDDING in known else last}
    if not isinstance(site, Site) or (site.point not in known and site not in ends):
        raise ResultError(
            f"{one!r}; expected one of {', '.join(known)}, a site such as Site(12, 'q', head=3), or '12.q.3'"
        )
    check_site(model, site)
    if site.point in known and site.point != "mlp_out" and site.head is None:
        return [Site(site.layer, site.point, head=h) for h in range(n_heads(model, site))]
    return [site]


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
