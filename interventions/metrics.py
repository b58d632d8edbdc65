"""What an intervention did to the next-token distribution. Natural logarithms; p is the clean, q the intervened distribution."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interventions.errors import EditError

Logits = Float[Tensor, "row vocab"]

_LARGE = 60.0  # exp(60) is far from float32's largest number
_SMALL_KL = 1e-5  # above, what cancels in exp(d) − 1 − d for |d| < 0.01 is about 1e-5 of the whole


class CleanSide:
    """Clean logits and what metrics form of them, each once however many edits are compared with them."""

    def __init__(self, logits: Logits):
        self.logits = _wide(logits)

    @cached_property
    def log_p(self) -> Logits:
        return self.logits.log_softmax(-1)

    @cached_property
    def p(self) -> Logits:
        return self.log_p.exp()

    @cached_property
    def top1(self) -> Int[Tensor, "row"]:
        return self.logits.argmax(-1)

    @cached_property
    def entropy(self) -> Float[Tensor, "row"]:
        return -_dot(self.p, self.log_p)


class CleanRows:
    """The clean side of several edits, each of a row of `side`; taken from there when asked for, not before."""

    def __init__(self, side: CleanSide, index: Int[Tensor, "row"] | slice):
        self.side, self.index = side, index

    def __getattr__(self, name: str) -> Tensor:
        value = getattr(self.side, name)[self.index]
        self.__dict__[name] = value
        return value


class Comparison:
    """Clean and intervened logits side by side.

    With d = log q − log p up to a constant, centred so that Σ p·d = 0:

        KL(p‖q) = log Σ p·exp(d) = log1p(Σ p·(exp(d) − 1 − d))

    Every term is ≥ 0 and formed without cancellation, so float32 is as exact for a KL of 1e-13 as for one of 30.
    Half-precision logits are widened first.
    """

    def __init__(self, clean: CleanSide | CleanRows, intervened: Logits):
        self.clean, self.intervened = clean, _wide(intervened)  # one clean row stands for all edits, or one for each

    @cached_property
    def d(self) -> Logits:
        d = self.intervened - self.clean.logits
        for _ in range(2):  # once more for what rounding of p leaves of a constant between the two
            d.sub_(_dot(self.clean.p, d)[:, None])
        return d

    @cached_property
    def kl(self) -> Float[Tensor, "row"]:
        d, p = self.d, self.clean.p
        if d.device.type == "cpu" and bool(
            d.amax() <= _LARGE
        ):  # elsewhere these questions would cost a synchronisation
            kl = torch.log1p(_dot(p, torch.expm1(d).sub_(d)))
            small = (kl < _SMALL_KL).nonzero()[:, 0]
            if len(small):  # only there does the difference above cancel
                kl[small] = torch.log1p(_dot(p if len(p) == 1 else p[small], _growth(d[small])))
            return kl
        # Where d is large p may have underflowed, but q = p·exp(d) need not have.
        grown = torch.exp((self.clean.log_p + d).clamp_(max=_LARGE)) - p - p * d
        near = p * _growth(d.clamp(max=_LARGE))
        total = torch.where(d > _LARGE, grown, near).sum(-1)
        return torch.where(total < math.exp(_LARGE / 2), torch.log1p(total), torch.logsumexp(self.clean.log_p + d, -1))

    @cached_property
    def js(self) -> Float[Tensor, "row"]:
        # With w = log q − log p and L = log((p + q)/2p):  JS = ½ Σ w·q − L·(p + q);  for small w  ½ Σ p·(w²/4 + w³/8 + w⁴/32).
        p, log_p = self.clean.p, self.clean.log_p
        w = self.d - self.kl[:, None]
        q = (log_p + w).exp_()
        both = p + q
        middle = torch.log((both * 0.5).clamp_(min=torch.finfo(both.dtype).tiny)).sub_(log_p)
        full = torch.where(both == 0, 0.0, w * q - middle * both)
        series = p * w * w * (0.25 + w * (0.125 + w / 32))
        return 0.5 * torch.where(w.abs() < 0.05, series, full).sum(-1).clamp_min_(0)  # what rounding leaves below 0

    @cached_property
    def top1_changed(self) -> Bool[Tensor, "row"]:
        top = self.clean.top1.expand(len(self.intervened))[:, None]
        return self.intervened.gather(-1, top).squeeze(-1) < self.intervened.amax(-1)

    @cached_property
    def top1(self) -> Int[Tensor, "row"]:
        # Where the clean token ties for the largest logit (half precision) it is still the one.
        top, changed = self.clean.top1.expand(len(self.intervened)), self.top1_changed
        if top.device.type != "cpu":
            return torch.where(changed, self.intervened.argmax(-1), top)
        which = changed.nonzero()[:, 0]  # few; an argmax of all costs more than their KL
        return top.index_copy(0, which, self.intervened[which].argmax(-1)) if len(which) else top

    @cached_property
    def top1_drop(self) -> Float[Tensor, "row"]:
        top = self.clean.top1.expand(len(self.intervened))[:, None]
        return self.kl - self.d.gather(-1, top).squeeze(-1)


METRICS: dict[str, Callable[[Comparison], Tensor]] = {
    "kl": lambda c: c.kl,
    "js": lambda c: c.js,
    "top1_changed": lambda c: c.top1_changed,
    "top1_drop": lambda c: c.top1_drop,
    "top1": lambda c: c.top1,
    "clean_top1": lambda c: c.clean.top1.expand(len(c.intervened)),
    "clean_entropy": lambda c: c.clean.entropy.expand(len(c.intervened)),
}
"""Metrics by name, each from a `Comparison` to one number a row: `kl` and `js` in nats, `top1_changed` a truth value (the
clean top-1 token is no longer the largest), `top1_drop` = log p − log q of the clean top-1 token, nats, `top1` and `clean_top1` the
ids of the most likely token, intervened and clean, `clean_entropy` in nats (the same for every edit of a token)."""


@dataclass(frozen=True, eq=False)
class TokenMetric:
    """A number formed of the logits of some tokens, intervened (`name`) and clean (`clean_name`)."""

    tokens: Any
    """token ids: one, several, or one list for each row `[row, token]`"""
    name: str = field(default="", kw_only=True)
    """of its columns in the result"""

    def __call__(self, logits: Float[Tensor, "line vocab"], rows: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
        """Its value for each of `rows`, indices of rows of the call: `logits` has a line for each, or one for all."""
        return self._of(_wide(logits).expand(len(rows), -1), rows)

    def _of(self, logits: Logits, rows: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
        raise NotImplementedError

    def _ids(self) -> tuple[Any, ...]:
        return (self.tokens,)

    def check(self, n_rows: int) -> None:
        """Raise `EditError` for token lists that do not fit the rows."""
        for given in self._ids():
            ids = _as_ids(given)
            if ids.is_floating_point() or ids.shape[-1] == 0 or ids.ndim > 2 or (ids.ndim == 2 and len(ids) != n_rows):
                raise EditError(
                    f"{self.name}: token ids of shape {list(ids.shape)}; expected one or more, the same for all or [{n_rows}, token]"
                )

    def _at(self, logits: Logits, ids: Any, rows: Int[Tensor, "row"]) -> Float[Tensor, "row token"]:
        ids = _as_ids(ids)
        ids = ids.expand(len(logits), -1) if ids.ndim == 1 else ids[rows]
        if int(ids.min()) < 0 or int(ids.max()) >= logits.shape[-1]:
            raise EditError(f"{self.name}: a token id lies outside the vocabulary of {logits.shape[-1]}")
        return logits.gather(-1, ids.to(logits.device))


def _as_ids(ids: Any) -> Tensor:
    return torch.atleast_1d(torch.as_tensor(ids)).cpu()


@dataclass(frozen=True, eq=False)
class LogitDifference(TokenMetric):
    """Mean logit of `tokens` minus mean logit of `against`."""

    against: Any = ()
    """token ids, as `tokens`"""
    name: str = field(default="logit_difference", kw_only=True)

    def _ids(self) -> tuple[Any, ...]:
        return (self.tokens, self.against)

    def _of(self, logits: Logits, rows: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
        return self._at(logits, self.tokens, rows).mean(-1) - self._at(logits, self.against, rows).mean(-1)


@dataclass(frozen=True, eq=False)
class Probability(TokenMetric):
    """Probability of the next token being one of `tokens`."""

    name: str = field(default="probability", kw_only=True)

    def _of(self, logits: Logits, rows: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
        return (self._at(logits, self.tokens, rows).logsumexp(-1) - logits.logsumexp(-1)).exp()


@dataclass(frozen=True, eq=False)
class Rank(TokenMetric):
    """How many tokens have a larger logit than the best of `tokens` (0: it is the most likely)."""

    name: str = field(default="rank", kw_only=True)

    def _of(self, logits: Logits, rows: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
        return (
            (logits > self._at(logits, self.tokens, rows).amax(-1, keepdim=True))
            .sum(-1)
            .to(logits.dtype)
            .expand(len(rows))
        )


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _growth(d: Tensor) -> Tensor:
    """exp(d) − 1 − d ≥ 0, by its series d²·(1/2 + d/6 + d²/24) where the difference would cancel."""
    series = torch.add(torch.full_like(d[:1, :1], 1 / 6), d, alpha=1 / 24).mul_(d).add_(0.5).mul_(d).mul_(d)
    return torch.where(d.abs() < 0.01, series, torch.expm1(d).sub_(d))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row; `a` may be one row for all."""
    return b @ a[0] if len(a) == 1 else (a * b).sum(-1)


def kl_divergence(clean: Logits, intervened: Logits) -> Float[Tensor, "row"]:
    """KL(clean ‖ intervened) = Σ p (log p − log q), nats, of logits; ≥ 0, relative error ≤ 1e-4 in float32 from 1e-13 up."""
    return Comparison(CleanSide(clean), intervened).kl


def js_divergence(clean: Logits, intervened: Logits) -> Float[Tensor, "row"]:
    """Jensen-Shannon divergence ½KL(p‖m) + ½KL(q‖m), m = (p+q)/2, nats, ≤ ln 2 up to rounding, of logits."""
    return Comparison(CleanSide(clean), intervened).js


def entropy(logits: Logits) -> Float[Tensor, "row"]:
    """−Σ p log p, nats."""
    return CleanSide(logits).entropy


def top1_changed(clean: Logits, intervened: Logits) -> Bool[Tensor, "row"]:
    """Whether the clean top-1 token is no longer the most likely one."""
    return Comparison(CleanSide(clean), intervened).top1_changed


def centred_logits(logits: Logits) -> Logits:
    """Logits minus their mean over the vocabulary: a softmax does not see the mean."""
    return _wide(logits) - _wide(logits).mean(-1, keepdim=True)


def logit_difference(
    logits: Logits, tokens: Int[Tensor, "token"], against: Int[Tensor, "other"]
) -> Float[Tensor, "row"]:
    """Mean logit of one set of token ids minus that of another."""
    return LogitDifference(tokens, against)(logits, torch.arange(len(logits)))
