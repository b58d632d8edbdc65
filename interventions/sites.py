"""Where in the model an activation stands."""

import re
from dataclasses import dataclass

from interventions.errors import SiteError

POINTS = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""`resid_pre`: the residual stream that block `layer` reads; `resid_post`: the stream that it hands on. `attn_out`, `mlp_out`:
what attention and MLP add to it (after the post-norms of Gemma and OLMo). `resid_mid`: the stream between the two."""


@dataclass(frozen=True, order=True)
class Site:
    """One point of block `layer` (0-based); `POINTS` says which there are. On every path a site means one thing:

        resid_mid = resid_pre + attn_out        resid_post = resid_mid + mlp_out

    An edit of `resid_mid` is the same change made at `attn_out`. (TransformerLens' `hook_resid_mid` is what the MLP's norm
    reads: an edit there leaves the stream untouched.) The block's own sum rounds there: a vector far shorter than the stream it
    replaces, zero for one, carries that rounding. Blocks with attention and MLP side by side have no `resid_mid`.
    Raises `SiteError` for an unknown point or a negative layer.
    """

    layer: int
    """index of the block, from 0"""
    point: str = "resid_post"
    """one of `POINTS`"""

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise SiteError(f"no site {self.point!r} in block {self.layer}; known: {', '.join(POINTS)}")
        if self.layer < 0:
            raise SiteError(f"layer {self.layer} is negative; layers count from 0")

    @classmethod
    def parse(cls, name: str) -> "Site":
        """From a TransformerLens or SAELens hook name, `blocks.15.hook_resid_post`, or from our own `15.resid_post`."""
        match = re.fullmatch(r"(?:blocks\.)?(\d+)\.(?:hook_)?([a-z_]+)", name)
        if match is None:
            raise SiteError(f"no site {name!r}; expected a name such as 'blocks.15.hook_resid_post'")
        return cls(int(match[1]), match[2])

    @property
    def hook_name(self) -> str:
        """The TransformerLens name, `blocks.15.hook_resid_post`."""
        return f"blocks.{self.layer}.hook_{self.point}"

    @property
    def entry(self) -> "Site":
        """Where in the stream a replayed token enters: at the site itself, or where its block begins."""
        return self if self.point in ("resid_pre", "resid_post") else Site(self.layer, "resid_pre")

    @property
    def first_block(self) -> int:
        """Index of the first block that computes something new after an edit here (the number of blocks: none does)."""
        return self.layer + (self.point == "resid_post")

    def check(self, n_layers: int) -> None:
        """Raise `SiteError` when the model has no such block."""
        if self.layer >= n_layers:
            raise SiteError(
                f"no block {self.layer} in a model of {n_layers} blocks; layers run from 0 to {n_layers - 1}"
            )

    def __str__(self) -> str:
        return f"{self.layer}.{self.point}"
