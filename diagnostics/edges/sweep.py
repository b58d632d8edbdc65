"""One upward sweep over the blocks: what each sender writes anew, and what each receiver makes of it, all senders at once.

    x′ = x + Δ_sender        x: what stands in the base run at the block's input (an MLP: between attention and MLP)

A receiver's q, k, v or output follows from x′ alone, token by token, by the model's own block.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from diagnostics.edges.design import EMBEDDED, Settings, reaches
from diagnostics.pairs.controls import unit
from diagnostics.pairs.pair import Pairs
from interventions.errors import SiteError
from interventions.models.anatomy import adder, at_site, side_by_side
from interventions.models.causal_model import CausalModel
from interventions.models.causality import LEAK
from interventions.models.exclusive import forward_replaced
from interventions.models.inside import check_inside
from interventions.recording import Recording, record
from interventions.replaying.replay import entering_at
from interventions.sites import Site

_TOKENS = 2048
"""tokens of one pass through a block"""
_THROUGH = ("q", "k", "v")


class Tokens(NamedTuple):
    """All tokens of some pairs from the first differing one on: before it both runs are the same."""

    pair: Int[ndarray, "token"]
    """number of the pair within the unit"""
    position: Int[ndarray, "token"]
    last: Int[ndarray, "token"]
    """bool: the last token of its prompt"""

    @classmethod
    def of(cls, pairs: Pairs, which: Sequence[int]) -> "Tokens":
        """Tokens of these pairs, pair by pair."""
        first, length = (x[list(which)].numpy() for x in (pairs.first_difference, pairs.length))
        pair = np.repeat(np.arange(len(which)), length - first)
        position = np.concatenate([np.arange(a, b) for a, b in zip(first, length, strict=True)])
        return cls(pair, position, position == length[pair] - 1)

    def at(self, recording: Recording, site: Site) -> Tensor:
        """What stands at a site, `[token, width]`."""
        return recording.at(site, torch.from_numpy(self.pair), torch.from_numpy(self.position))


class Received(NamedTuple):
    """What a receiver of a block makes of senders' changes, where there is any change."""

    site: Site
    sender: Int[ndarray, "change"]
    """number of the sender"""
    token: Int[ndarray, "change"]
    vectors: Float[Tensor, "change width"]
    dose: Float[ndarray, "change"]
    """‖x′ − x‖/‖x‖ of what the receiver reads; nan where a control has no direction"""


def runs_of(model: CausalModel, pairs: Pairs, which: Sequence[int], settings: Settings) -> dict[str, Recording]:
    """Clean and corrupt runs, with all that a sweep reads."""
    top = max(site.layer for site in (*settings.senders, *settings.receivers))
    layers = range(top + 1 if settings.later == "run" else model.n_layers)
    sites: set[Site] = {Site(model.n_layers - 1), EMBEDDED}
    for layer in layers:
        between = "resid_pre" if side_by_side(model, layer) else "resid_mid"
        sites |= {Site(layer, point) for point in ("resid_pre", "attn_out", "mlp_out", between)}
    sites |= {site.whole for site in (*settings.senders, *settings.receivers)}
    ordered = sorted(sites, key=lambda s: s.rank)
    return {run: record(model, [getattr(pairs, run)[i] for i in which], ordered) for run in ("clean", "corrupt")}


class Sweep:
    """Changes of all senders carried up the residual stream of the base run.

    along: of a control, the difference of two other pairs' runs at a site, `[token, width]`. Each sender then writes as much as it does
    anew, token by token, in the direction of what it makes of this difference.
    """

    def __init__(
        self,
        base: Recording,
        source: Recording,
        tokens: Tokens,
        settings: Settings,
        along: Callable[[Site], Tensor] | None = None,
    ):
        self.base, self.source, self.tokens, self.settings, self.along = base, source, tokens, settings, along
        self.model = base.model
        top = max(site.layer for site in settings.receivers)
        self.senders = [site for site in settings.senders if site.layer <= top]
        wide = torch.promote_types(self.model.stream_dtype, torch.float32)
        shape = len(self.senders), len(tokens.pair), self.model.d_model
        self.delta = torch.zeros(shape, dtype=wide, device=self.model.device)
        """what each sender has changed in the stream so far, `[sender, token, d_model]`"""

    def received(self) -> Iterator[Received]:
        """Block by block, what each receiver makes of the senders below it."""
        self._write(EMBEDDED)
        for layer in range(max(site.layer for site in self.settings.receivers) + 1):
            here = [site for site in self.settings.receivers if site.layer == layer]
            if heads := [site for site in here if site.point in _THROUGH]:
                yield from self._read(heads)
            heads_first = not side_by_side(self.model, layer)
            if heads_first:
                self._write(Site(layer, "z"))
            if any(site.point == "mlp_out" for site in here):
                yield from self._read([Site(layer, "mlp_out")])
            if self.settings.mlps == "recomputed":
                self._through_mlp(layer)
            if not heads_first:
                self._write(Site(layer, "z"))
            self._write(Site(layer, "mlp_out"))
            if any(site.point == "resid_post" for site in here):
                sender, token = self._changed(self.tokens.last)
                stream = self.tokens.at(self.base, Site(layer))
                yield Received(
                    Site(layer), sender, token, self._moved(stream, sender, token), self._dose(stream)[sender, token]
                )

    def _dose(self, x: Float[Tensor, "token d_model"]) -> Float[ndarray, "sender token"]:
        return (self.delta.norm(dim=-1) / x.to(self.delta.dtype).norm(dim=-1).clamp(min=1e-30)).cpu().numpy()

    def _changed(self, among: ndarray | None = None) -> tuple[ndarray, ndarray]:
        """Senders and tokens with any change."""
        found = (self.delta != 0).any(-1).cpu().numpy()
        sender, token = np.nonzero(found if among is None else found & among)
        return sender, token

    def _moved(
        self, x: Float[Tensor, "token d_model"], sender: ndarray, token: ndarray
    ) -> Float[Tensor, "change d_model"]:
        sender_, token_ = (torch.from_numpy(i).to(x.device) for i in (sender, token))
        return (x[token_].to(self.delta.dtype) + self.delta[sender_, token_]).to(x.dtype)

    def _read(self, sites: list[Site]) -> Iterator[Received]:
        """Queries, keys and values of a block, or what its MLP gives."""
        layer, points = sites[0].layer, list(dict.fromkeys(site.point for site in sites))
        everywhere = any(self.settings.positions[point] != "last" for point in points)
        sender, token = self._changed(None if everywhere else self.tokens.last)
        if not len(sender):
            return
        stream = self._between(layer, points[0])
        new, dose = self._block(layer, points, stream, sender, token), self._dose(stream)[sender, token]
        for site in sites:
            allowed = np.array([reaches(self.model, s, site) for s in self.senders])[sender]
            if self.settings.positions[site.point] == "last":
                allowed &= self.tokens.last[token]
            kept = np.flatnonzero(allowed)
            vectors = new[site.point]
            if site.head is not None:
                here = check_inside(self.model, site)
                vectors = vectors.unflatten(-1, (here.heads(site.point), -1))[:, site.head]
            own = vectors[torch.from_numpy(kept).to(vectors.device)]
            yield Received(site, sender[kept], token[kept], own, dose[kept])

    def _between(self, layer: int, point: str) -> Float[Tensor, "token d_model"]:
        """What queries, keys and values are made of, or the MLP's output."""
        before_mlp = "resid_pre" if side_by_side(self.model, layer) else "resid_mid"
        return self.tokens.at(self.base, Site(layer, before_mlp if point == "mlp_out" else "resid_pre"))

    def _block(
        self, layer: int, points: list[str], stream: Tensor, sender: ndarray, token: ndarray
    ) -> dict[str, Float[Tensor, "change width"]]:
        """What a block makes of the changed stream at some points, token by token; first checked on the unchanged stream."""
        clean = self._alone(layer, points, stream)
        for point in points:
            expected = self.tokens.at(self.base, Site(layer, point))
            _check_alike(clean[point], expected, f"{point} of block {layer}, computed token by token")
        parts = [
            self._alone(layer, points, self._moved(stream, sender[at : at + _TOKENS], token[at : at + _TOKENS]))
            for at in range(0, len(sender), _TOKENS)
        ]
        return {point: torch.cat([part[point] for part in parts]) for point in points}

    def _alone(self, layer: int, points: list[str], value: Float[Tensor, "token d_model"]) -> dict[str, Tensor]:
        """One block on tokens that stand alone, each a prompt of its own: what is read here does not depend on other tokens.

        For an MLP the stream between attention and MLP is fed in, and attention adds 0 to it.
        """
        model, seen = self.model, {}
        value = value[:, None]
        with ExitStack() as stack:
            stack.enter_context(entering_at(self.base, layer, value))
            given = model.handed_on(value)
            for block in model.blocks[layer + 1 :]:
                stack.enter_context(forward_replaced(block, lambda *_, **__: given))
            if "mlp_out" in points:
                stack.enter_context(at_site(model, Site(layer, "attn_out"), torch.zeros_like))
            for point in points:

                def keep(x: Tensor, point: str = point) -> None:
                    seen[point] = x[:, 0]

                stack.enter_context(at_site(model, Site(layer, point), keep))
            model.base(input_ids=torch.zeros(len(value), 1, dtype=torch.long, device=value.device), use_cache=False)
        return seen

    def _through_mlp(self, layer: int) -> None:
        """Let a block's MLP see the changes so far, and add what it makes of them."""
        sender, token = self._changed()
        if not len(sender):
            return
        stream = self._between(layer, "mlp_out")
        new = self._block(layer, ["mlp_out"], stream, sender, token)["mlp_out"]
        at = [torch.from_numpy(i).to(new.device) for i in (sender, token)]
        before = self.tokens.at(self.base, Site(layer, "mlp_out"))[at[1]]
        self.delta[at[0], at[1]] += new.to(self.delta.dtype) - before.to(self.delta.dtype)

    def _write(self, place: Site) -> None:
        """Let the senders at a place write as in the source run, or as much along the control's difference."""
        which = [i for i, site in enumerate(self.senders) if site.whole == place]
        if not which:
            return
        wide = self.delta.dtype
        there, here = (self.tokens.at(run, place).to(wide) for run in (self.source, self.base))
        own = self._written(place, which, there - here)
        if self.along is not None:
            far, other = own.norm(dim=-1, keepdim=True), self._written(place, which, self.along(place))
            own = torch.where(far > 0, far * unit(other), 0.0)
        self.delta[which] = own

    def _written(
        self, place: Site, which: list[int], change: Float[Tensor, "token width"]
    ) -> Float[Tensor, "sender token d_model"]:
        """What each sender at a place writes anew where what stands there changes."""
        if place.point != "z":
            return change.to(self.delta.dtype)[None]
        return self._heads(place, [self.senders[i].head or 0 for i in which], change).to(self.delta.dtype)

    def _heads(self, site: Site, heads: list[int], change: Tensor) -> Float[Tensor, "head token d_model"]:
        """What heads of a block write anew: Δz·W_O; under a post-norm the change of its output where that head's z alone changes."""
        here = self.tokens.at(self.base, site)
        inside = check_inside(self.model, site)
        place, added = inside.places["z"].module, adder(self.model, Site(site.layer, "attn_out"))
        linear = any(module is place for module in added.modules())

        def written(z: Float[Tensor, "*any width"]) -> Float[Tensor, "*any d_model"]:
            out = place(z.flatten(0, -2)[None])
            out = out if linear else added(out)
            return out[0].unflatten(0, z.shape[:-1])

        found, expected = written(here), self.tokens.at(self.base, Site(site.layer, "attn_out"))
        _check_alike(found, expected, f"what the heads of block {site.layer} write by its output projection")
        start = torch.zeros_like(here) if linear else here
        own = torch.zeros(len(heads), inside.heads("z"), dtype=here.dtype, device=here.device)
        own[range(len(heads)), heads] = 1
        step = own[:, None, :, None] * change.to(here.dtype).unflatten(-1, (inside.heads("z"), -1))
        moved = start + step.flatten(-2)
        return (written(moved) - written(start)) * (step != 0).flatten(-2).any(-1, keepdim=True)


def _check_alike(found: Tensor, expected: Tensor, what: str) -> None:
    wide = torch.promote_types(found.dtype, torch.float32)
    off = (found.to(wide) - expected.to(wide)).norm(dim=-1) / expected.to(wide).norm(dim=-1).clamp(min=1e-30)
    if not bool((off <= LEAK.get(found.dtype, max(LEAK.values()))).all()):
        raise SiteError(
            f"{what}, is off by {float(off.max()):.1e} of its norm from what the model gives in a whole prompt; edges need a model "
            "whose projections and MLPs treat each token alone and the same way"
        )
