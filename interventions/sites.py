"""Where in the model an activation stands."""

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import total_ordering
from typing import Any

from interventions.errors import SiteError

POINTS = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""`resid_pre`: the residual stream that block `layer` reads; `resid_post`: the stream that it hands on. `attn_out`, `mlp_out`:
what attention and MLP add to it (after the post-norms of Gemma and OLMo). `resid_mid`: the stream between the two."""
HEADS = ("q", "k", "v", "pattern", "z")
"""Inside attention. `q`, `k`, `v`: what the projections give, before rotary embeddings and before any norm of queries and keys.
`pattern`: the weights with which one token attends to each token of its prompt. `z`: a head's mixed values, which the output
projection reads."""
INSIDE = (*HEADS, "neurons")
"""Inside a block: `HEADS`, and `neurons`, what the MLP's down projection reads."""
_TRANSFORMER_LENS = {point: f"attn.hook_{point}" for point in HEADS} | {"neurons": "mlp.hook_post"}
_IN_ORDER = ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "neurons", "mlp_out", "resid_post")


@total_ordering
@dataclass(frozen=True)
class Site:
    """One point of block `layer` (0-based); `POINTS` and `INSIDE` say which there are. On every path a site means one thing:

        resid_mid = resid_pre + attn_out        resid_post = resid_mid + mlp_out

    An edit of `resid_mid` is the same change made at `attn_out`. (TransformerLens' `hook_resid_mid` is what the MLP's norm
    reads: an edit there leaves the stream untouched.) The block's own sum rounds there: a vector far shorter than the stream it
    replaces, zero for one, carries that rounding. Blocks with attention and MLP side by side have no `resid_mid`.

        Site(12, "z", head=3)                    Site(12, "neurons", neurons=(5, 9))

    Without a head `q`, `k`, `v` and `z` are those of all heads, one head after the other; grouped-query models have fewer heads
    at `k` and `v`. A vector at `pattern` has a weight for each token of the longest prompt, 0 after the token that attends.
    Raises `SiteError` for an unknown point, a negative layer, and a head or neurons where the point has none.
    """

    layer: int
    """index of the block, from 0"""
    point: str = "resid_post"
    """one of `POINTS` or `INSIDE`"""
    head: int | None = None
    """one head of `HEADS`; None: all"""
    neurons: tuple[int, ...] | None = None
    """some of `neurons`; None: all"""

    def __post_init__(self) -> None:
        if self.point not in (*POINTS, *INSIDE):
            raise SiteError(
                f"no site {self.point!r} in block {self.layer}; known: {', '.join(POINTS)}, and inside a block {', '.join(INSIDE)}"
            )
        try:
            object.__setattr__(self, "layer", operator.index(self.layer))
        except TypeError:
            raise SiteError(
                f"layer {self.layer!r}; expected the number of a block, as in Site(15), or a name, as in Site.parse('15.resid_post')"
            ) from None
        if self.layer < 0:
            raise SiteError(f"layer {self.layer} is negative; layers count from 0")
        if self.head is not None and (self.point not in HEADS or self.head < 0):
            raise SiteError(f"no head {self.head} at {self.point}; heads count from 0, at {', '.join(HEADS)}")
        if self.neurons is not None:
            object.__setattr__(self, "neurons", tuple(int(i) for i in self.neurons))
            if self.point != "neurons" or not self.neurons or min(self.neurons) < 0:
                raise SiteError(
                    f"no neurons {self.neurons} at {self.point}; neurons count from 0, at the point 'neurons'"
                )
            if len(set(self.neurons)) < len(self.neurons):
                raise SiteError(f"neurons {self.neurons}; expected each of them once")

    @classmethod
    def parse(cls, name: str) -> "Site":
        """From a TransformerLens or SAELens hook name, `blocks.15.hook_resid_post` or `blocks.15.attn.hook_z`, or from our own
        `15.resid_post`, `15.z`, `15.z.3` (head 3), `15.neurons.5,9`."""
        inside = {hook: point for point, hook in _TRANSFORMER_LENS.items()}
        if (match := re.fullmatch(r"blocks\.(\d+)\.((?:attn|mlp)\.hook_[a-z]+)", name)) and match[2] in inside:
            return cls(int(match[1]), inside[match[2]])
        match = re.fullmatch(r"(?:blocks\.(\d+)\.hook_|(\d+)\.)([a-z_]+)(?:\.(\d+(?:,\d+)*))?", name)
        if match is None or (match[1] is not None and match[3] in INSIDE):
            raise SiteError(
                f"no site {name!r}; expected a name such as 'blocks.15.hook_resid_post', '15.resid_post' or '15.z.3'"
            )
        layer, point, which = int(match[1] or match[2]), match[3], match[4]
        if which is None:
            return cls(layer, point)
        if point == "neurons":
            return cls(layer, point, neurons=tuple(map(int, which.split(","))))
        if "," in which:
            raise SiteError(f"no site {name!r}; expected one head")
        return cls(layer, point, head=int(which))

    @property
    def hook_name(self) -> str:
        """The TransformerLens name, `blocks.15.hook_resid_post`; of a head or of some neurons that of all."""
        return f"blocks.{self.layer}.{_TRANSFORMER_LENS.get(self.point, f'hook_{self.point}')}"

    @property
    def whole(self) -> "Site":
        """The site of all heads or neurons."""
        return self if self.head is None and self.neurons is None else Site(self.layer, self.point)

    @property
    def inside(self) -> bool:
        """Whether it is inside attention or the MLP."""
        return self.point in INSIDE

    @property
    def entry(self) -> "Site":
        """Where in the stream a replayed token enters: at the site itself, or where its block begins."""
        return self if self.point in ("resid_pre", "resid_post") else Site(self.layer, "resid_pre")

    @property
    def first_block(self) -> int:
        """Index of the first block that computes something new after an edit here (the number of blocks: none does)."""
        return self.layer + (self.point == "resid_post")

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts sites in the order in which a forward pass reaches them."""
        return self.layer, _IN_ORDER.index(self.point)

    def check(self, n_layers: int) -> None:
        """Raise `SiteError` when the model has no such block."""
        if self.layer >= n_layers:
            raise SiteError(
                f"no block {self.layer} in a model of {n_layers} blocks; layers run from 0 to {n_layers - 1}"
            )

    def __lt__(self, other: "Site") -> bool:
        return self._key < other._key

    @property
    def _key(self) -> tuple:
        return self.layer, self.point, -1 if self.head is None else self.head, self.neurons or ()

    def __str__(self) -> str:
        which = "" if self.head is None else f".{self.head}"
        which += "" if self.neurons is None else f".{','.join(map(str, self.neurons))}"
        return f"{self.layer}.{self.point}{which}"


SiteLike = Site | str
"""A site, or its name (see `Site.parse`)."""


def several(given: Any) -> tuple[Any, ...]:
    """What may be one thing or several, as a tuple: a text, a number or a site is one."""
    return tuple(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes) else (given,)


def as_site(given: Any) -> Site:
    """A site as it is, or of its name. Raises `SiteError` for anything else."""
    if isinstance(given, Site):
        return given
    if isinstance(given, str):
        return Site.parse(given)
    raise SiteError(f"no site {given!r}; expected Site(15, 'resid_post') or a name such as '15.resid_post'")


def as_sites(given: Any, layers: Sequence[int] = ()) -> tuple[Site, ...]:
    """One site or several, each once, in their order; a point (`mlp_out`) is that point of each of `layers`."""
    found: list[Site] = []
    for one in several(given):
        at_each = isinstance(one, str) and one in (*POINTS, *INSIDE) and layers
        found += [Site(layer, one) for layer in layers] if at_each else [as_site(one)]
    return tuple(dict.fromkeys(found))
