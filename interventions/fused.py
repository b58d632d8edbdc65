"""Clean against intervened logits in one Triton kernel, for CUDA: KL, JS and the top-1 token of a row in three passes over its logits.

The formulas are those of `metrics.Comparison`. Its arrays of `[row, vocab]` are never formed: a row's logits are read twice, a third
time for JS, in the dtype that they have.
"""

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interventions.errors import one_line

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_REAL = ("kl", "js", "top1_drop")
_WHOLE = ("top1", "clean_top1", "top1_changed", "finite")


def usable(logits: Tensor) -> bool:
    """Whether `compare` runs on these logits, which takes no gradients; a warning, once, where they are on a GPU and it cannot."""
    return logits.is_cuda and logits.dtype in _DTYPES and not logits.requires_grad and _works(logits.device)


@cache
def _works(device: torch.device) -> bool:
    if not (torch.version.cuda or torch.version.hip):  # the tests' pretended device
        return False
    if find_spec("triton") is None:
        reason = "Triton is not installed"
    else:
        try:
            two = torch.zeros(2, 8, device=device)
            if not bool(compare(two, two, torch.arange(2, device=device))["kl"].any()):
                return True
            reason = "equal logits have a KL"
        except Exception as error:
            reason = one_line(error)
    warnings.warn(
        f"KL and JS are computed without the fused kernel on {device}: {reason}. This takes several times the time and memory",
        stacklevel=2,
    )
    return False


def compare(
    intervened: Float[Tensor, "row vocab"],
    clean: Float[Tensor, "clean vocab"],
    index: Int[Tensor, "row"],
    *,
    js: bool = True,
    block: int | None = None,
) -> dict[str, Tensor]:
    """Of each row against the clean row `index[row]`: kl, js, top1_drop (float32), top1, clean_top1, top1_changed and finite.

    As in `metrics.METRICS`: nats; nan, −1 and False where either side is no distribution. js=False leaves JS out, and a pass.
    block: tokens that are read at once.
    """
    n_row, n_col = intervened.shape
    intervened, clean = (x if x.stride(1) == 1 else x.contiguous() for x in (intervened, clean))
    real = torch.empty(len(_REAL), n_row, device=intervened.device)
    whole = torch.empty(len(_WHOLE), n_row, dtype=torch.long, device=intervened.device)
    block = block or min(2048 if intervened.is_cuda else 8192, 1 << (n_col - 1).bit_length())
    strides = intervened.stride(0), clean.stride(0)
    if n_row:
        given = intervened, clean, index.contiguous(), real, whole
        with torch.cuda.device_of(intervened):
            _kernel()[(n_row,)](*given, n_row, n_col, *strides, JS=js, BLOCK=block, num_warps=8)
    numbers = {name: x for name, x in zip(_REAL, real, strict=True) if js or name != "js"}
    return {**numbers, **{n: x.bool() if n in _WHOLE[2:] else x for n, x in zip(_WHOLE, whole, strict=True)}}


@cache
def _kernel() -> Any:
    triton, tl = import_module("triton"), import_module("triton.language")

    @triton.jit
    def kernel(
        x_ptr, c_ptr, index_ptr, real_ptr, whole_ptr, n_row, n_col, x_stride, c_stride,
        JS: tl.constexpr, BLOCK: tl.constexpr,  # pyright: ignore[reportInvalidTypeForm]
    ):  # fmt: skip
        FLOOR = -1e30  # as _FLOOR and _LARGE of `metrics`
        LARGE = 60.0
        row = tl.program_id(0).to(tl.int64)
        x_ptr += row * x_stride
        c_ptr += tl.load(index_ptr + row).to(tl.int64) * c_stride
        lane = tl.arange(0, BLOCK)

        # 1. The largest logit, log Σ exp and Σ p·(x − c), lane by lane, scaled by the largest so far
        c_top = tl.full([BLOCK], FLOOR, tl.float32)
        x_top = tl.full([BLOCK], FLOOR, tl.float32)
        c_sum = tl.zeros([BLOCK], tl.float32)
        x_sum = tl.zeros([BLOCK], tl.float32)
        moved = tl.zeros([BLOCK], tl.float32)
        c_at = tl.zeros([BLOCK], tl.int32)
        x_at = tl.zeros([BLOCK], tl.int32)
        for start in range(0, n_col, BLOCK):
            at = start + lane
            c = tl.load(c_ptr + at, mask=at < n_col, other=float("-inf")).to(tl.float32)
            x = tl.load(x_ptr + at, mask=at < n_col, other=float("-inf")).to(tl.float32)
            c = tl.where(c < FLOOR, FLOOR, c)  # nan stays
            x = tl.where(x < FLOOR, FLOOR, x)
            c_at = tl.where(c > c_top, at, c_at)
            x_at = tl.where(x > x_top, at, x_at)
            higher = tl.maximum(c_top, c)
            shrink = tl.exp(c_top - higher)
            e = tl.exp(c - higher)
            c_sum = c_sum * shrink + e
            moved = moved * shrink + e * (x - c)
            c_top = higher
            higher = tl.maximum(x_top, x)
            x_sum = x_sum * tl.exp(x_top - higher) + tl.exp(x - higher)
            x_top = higher
        c_max = tl.max(c_top, 0)
        x_max = tl.max(x_top, 0)
        c_total = tl.sum(c_sum * tl.exp(c_top - c_max), 0)
        x_total = tl.sum(x_sum * tl.exp(x_top - x_max), 0)
        c_log = tl.log(c_total)
        x_log = tl.log(x_total)
        apart = (x_max - c_max) + (x_log - c_log)
        shift = tl.sum(moved * tl.exp(c_top - c_max), 0) / c_total
        shift = tl.where(tl.abs(shift) < LARGE, shift, apart)
        c_best = tl.min(tl.where(c_top == c_max, c_at, n_col), 0)
        x_best = tl.min(tl.where(x_top == x_max, x_at, n_col), 0)

        # 2. With d = x − c − shift: Σ p·(exp(d) − 1 − d), each term ≥ 0, and Σ p·d, which is what rounding left of the shift
        growth = tl.zeros([BLOCK], tl.float32)
        left = tl.zeros([BLOCK], tl.float32)
        lowest = tl.zeros([BLOCK], tl.float32)
        for start in range(0, n_col, BLOCK):
            at = start + lane
            c = tl.load(c_ptr + at, mask=at < n_col, other=float("-inf")).to(tl.float32)
            x = tl.load(x_ptr + at, mask=at < n_col, other=float("-inf")).to(tl.float32)
            c = tl.where(c < FLOOR, FLOOR, c)
            x = tl.where(x < FLOOR, FLOOR, x)
            d = x - c - shift
            p = tl.exp(c - c_max) / c_total
            series = d * d * (0.5 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720 + d / 5040)))))
            near = p * tl.where(tl.abs(d) < 0.3, series, tl.exp(tl.minimum(d, LARGE)) - 1.0 - d)
            far = tl.exp(tl.minimum((x - c_max) - (c_log + shift), LARGE)) - p - p * d  # p may have underflowed
            growth += tl.where(d > LARGE, far, near)
            left += p * d
            lowest = tl.minimum(lowest, d)
        grown = tl.sum(growth, 0)
        rest = tl.sum(left, 0)
        total = grown + rest  # Σ p·exp(d), less 1
        one = 1.0 + total
        log1p = tl.where(
            one == 1.0, total, tl.log(tl.where(one > 0.0, one, 1.0)) * total / tl.where(one == 1.0, 1.0, one - 1.0)
        )
        level = tl.where(total < 1e13, log1p, apart - shift)  # log Σ p·exp(d)
        small = grown - total * total * (0.5 - total * (1 / 3 - total / 4))
        kl = tl.where(tl.abs(total) < 0.01, small, level - rest)
        kl = tl.where(kl < 0.0, 0.0, kl)  # what rounding leaves below 0
        beyond = tl.abs(rest) >= LARGE  # there d is log q − log p, and KL = −Σ p·d
        kl = tl.where(beyond, -rest, kl)
        kl = tl.where(tl.min(lowest, 0) < FLOOR / 2, float("inf"), kl)
        level = tl.where(beyond, 0.0, level)

        # 3. With w = log q − log p:  JS = −½ Σ |w|·min(p, q) + (p + q)·log(½ + ½exp(−|w|))
        total_js = tl.zeros([BLOCK], tl.float32)
        if JS:
            for start in range(0, n_col, BLOCK):
                at = start + lane
                c = tl.load(c_ptr + at, mask=at < n_col, other=float("-inf")).to(tl.float32)
                x = tl.load(x_ptr + at, mask=at < n_col, other=float("-inf")).to(tl.float32)
                c = tl.where(c < FLOOR, FLOOR, c)
                x = tl.where(x < FLOOR, FLOOR, x)
                w = x - c - shift - level
                p = tl.exp(c - c_max) / c_total
                q = tl.exp(x - x_max) / x_total
                full = -tl.abs(w) * tl.minimum(p, q) - (p + q) * tl.log(0.5 + 0.5 * tl.exp(-tl.abs(w)))
                series = p * w * w * (0.25 + w * (0.125 + w / 32))
                total_js += tl.where(tl.abs(w) < 0.05, series, full)
        js = tl.maximum(0.5 * tl.sum(total_js, 0), 0.0)

        c_finite = (c_log - c_log == 0.0) & (c_max > FLOOR / 2) & (c_max < float("inf"))
        finite = c_finite & (x_log - x_log == 0.0) & (x_max > FLOOR / 2) & (x_max < float("inf"))
        x_there = tl.load(x_ptr + tl.minimum(c_best, n_col - 1)).to(tl.float32)
        changed = finite & (x_there < x_max)
        drop = (level + shift) - (tl.where(x_there < FLOOR, FLOOR, x_there) - c_max)
        drop = tl.where(drop > -FLOOR / 2, float("inf"), drop)
        nan = float("nan")
        tl.store(real_ptr + row, tl.where(finite, kl, nan))
        tl.store(real_ptr + n_row + row, tl.where(finite, js, nan))
        tl.store(real_ptr + 2 * n_row + row, tl.where(finite, drop, nan))
        tl.store(whole_ptr + row, tl.where(finite, tl.where(changed, x_best, c_best), -1).to(tl.int64))
        tl.store(whole_ptr + n_row + row, tl.where(c_finite, c_best, -1).to(tl.int64))
        tl.store(whole_ptr + 2 * n_row + row, changed.to(tl.int64))
        tl.store(whole_ptr + 3 * n_row + row, finite.to(tl.int64))

    return kernel
