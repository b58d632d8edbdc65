"""The second-order term of KL in a change Δ of an activation, exact over the whole vocabulary.

    KL(p ‖ p(x + Δ)) = ½ ΔᵀFΔ + O(‖Δ‖³),      ΔᵀFΔ = Var_{y~p}((JΔ)_y) = Σ_y p_y·((JΔ)_y − Σ p·JΔ)²

J is the derivative of the logits in the activation x, F = Jᵀ(diag p − ppᵀ)J the Fisher information of the next token in x. KL has no
first-order term. Two ways to JΔ, each a few passes through the same calls that `measure` makes:

    forward   dual numbers: x with tangent Δ (forward-mode differentiation), exact to rounding
    central   (logits(x + sΔ) − logits(x − sΔ))/2s with ‖sΔ‖ = ∛u·‖x‖

Here u is the machine epsilon (at least float32's, in which norms compute). The error of the difference, ∝ s², and that of rounding, ∝ u/s, are
then alike, about 1e-3 of JΔ in float32.

Source: the second-order expansion of KL by the Fisher information, as commonly known; through replay, ours.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from interventions.effects import Effects, Index, check_rows, choose_path, in_chunks
from interventions.errors import MechdiagError, ReplayError, is_out_of_memory, one_line
from interventions.models.spilled import FINAL
from interventions.models.uploads import upload
from interventions.recording import Recording
from interventions.replaying.chunks import Asked, hooked, read_tokens, replay_rows
from interventions.replaying.replay import unembed
from interventions.replaying.rows import Horizon, Reads, Rows, Vectors
from interventions.shared_directions import Along
from interventions.sites import SiteLike

METHODS = ("auto", "forward", "central")
Slopes = Float[Tensor, "some_read vocab"]
Number = Callable[[Slopes, Int[Tensor, "some_read"]], Float[Tensor, "some_read"]]
"""A number formed of the derivatives of log p(y) along each row's change, `[read, vocab]`, and the rows that they are of."""
_TRIAL_ROWS = 8
_AGREEMENT = {torch.float64: 0.05, torch.float32: 0.05}
"""Largest distance between the two ways that central differences explain, as a share of JΔ; a lost tangent costs more."""
_AGREEMENT_HALF = 0.5
_FEW, _FEW_GPU = 2**18, 2**27  # numbers compared at once: on the CPU what fits its caches


@dataclass(frozen=True, repr=False)
class SecondOrder(Effects):
    """½·Var_p(JΔ) of each read, nats, by the name `second_order`, other numbers formed of JΔ, and how they were made."""

    method: str
    """`forward` or `central`"""
    why_central: str | None
    """why forward mode was not used where both were allowed, or None"""
    agreement: float
    """distance between the two ways on 8 of the rows, √(Σ Var_p(difference) / Σ Var_p(central)); nan: not compared"""


@torch.no_grad()
def second_order(
    recording: Recording,
    site: SiteLike,
    prompt: Index,
    position: Index | Int[Tensor, "row edit"] | Sequence[Sequence[int]],
    change: Vectors | Along,
    *,
    also: Mapping[str, Number] | None = None,
    horizon: Horizon = 1,
    method: str = "auto",
    path: str = "auto",
    batch_rows: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> SecondOrder:
    """½·Σ_y p_y·((JΔ)_y − Σ p·JΔ)² of adding `change[row]` at `site` of token (prompt, position), nats.

    change: Δ, as `measure` takes edited vectors (but the difference, not the result). A row costs 2.2 (`central`) or 2.4
    (`forward`) times what it does in `measure`. also: further numbers by name, each a function of the derivatives of log p(y), (JΔ)_y −
    Σ p·JΔ, of some rows.
    method: `forward`, `central`, or `auto`: forward, where it runs and agrees with central differences on 8 of the rows; central
    differences, with a warning, where not. horizon, path, batch_rows, progress: see `measure`.

    Raises what `measure` raises; `ReplayError` where forward mode was asked for by name and does not run or agree.
    """
    if method not in METHODS:
        raise MechdiagError(f"method {method!r}; expected one of {', '.join(METHODS)}")
    also = dict(also or {})
    if "second_order" in also:
        raise MechdiagError("a number of your own is named 'second_order'; give it another name")
    given, before = change.change if isinstance(change, Along) else change, recording.recorded_again
    with recording.held():
        rows = check_rows(recording, site, prompt, position, given, horizon)
        size = batch_rows or (256 if recording.model.device.type == "cpu" else 2048)
        chosen = choose_path(rows, path, size)
        size = size if chosen.path == "replay" else min(size, 16)  # whose logits are held
        run = partial(Tangents, replays=chosen.path == "replay")
        method, why, agreement = choose_method(rows, method, run)
        asked = Asked((), len(rows))
        asked.names += ["second_order", *also]
        one_chunk = lambda rows, chunk, _: run(rows, chunk).numbers(method, also)  # noqa: E731
        size, halvings = in_chunks(rows, asked, one_chunk, size, progress)
    values, where, finite = asked.values(rows)
    bad = int(((where >= 0) & ~finite).sum())
    return SecondOrder(
        values, where, chosen.path, chosen.delta, chosen.why_hooks, halvings, bad, finite, method, why, agreement,
        recorded_again=recording.recorded_again - before,
    )  # fmt: skip


def choose_method(rows: Rows, method: str, run: Callable[..., "Tangents"]) -> tuple[str, str | None, float]:
    """The method (`METHODS`) for some rows, why it is not forward mode where that was allowed, and how well the two agree.

    Raises `ReplayError` as `second_order` does.
    """
    if method == "central":
        return method, None, float("nan")
    some = np.unique(np.linspace(0, len(rows) - 1, _TRIAL_ROWS).round().astype(int))
    trial = run(rows, rows.order[some])
    why, agreement = None, float("nan")
    try:
        agreement = trial.agreement()
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        if isinstance(error, MechdiagError) or is_out_of_memory(error):
            raise
        why = f"the model's forward pass cannot be differentiated in forward mode: {one_line(error)}"
    allowed = _AGREEMENT.get(rows.recording.model.dtype, _AGREEMENT_HALF)
    if why is None and not agreement <= allowed:
        why = f"forward mode and central differences differ by {agreement:.2g} of JΔ, allowed {allowed}"
    if why is None:
        return "forward", None, agreement
    if method == "forward":
        raise ReplayError(f"{why}; use method='auto' or 'central'")
    kind, model = f"second order: {re.split(r'[0-9]', why)[0]}", rows.recording.model
    if kind not in model.warned:
        model.warned.add(kind)
        warnings.warn(f"mechdiag falls back to central differences for {model.name}: {why}", stacklevel=4)
    return "central", why, agreement


@dataclass
class Tangents:
    """J times the changes that are the vectors of some rows, which are in ascending order of prompt."""

    rows: Rows
    chunk: Int[np.ndarray, "some_row"]
    replays: bool

    def __post_init__(self) -> None:
        self.reads: Reads = self.rows.reads(self.chunk)
        self.branches = self.rows.branches(self.chunk)
        x, delta = self.rows.clean_at_site(self.chunk), self.rows.edited(self.chunk)
        self.x, self.device = x, x.device
        self.of = torch.from_numpy(self.branches.row[self.branches.edited]).to(x.device)  # the row of each edit
        bad = ~(delta.isfinite() & x.isfinite()).all(-1)
        self.delta = delta.masked_fill(bad[:, None], 0.0)  # else one row could spoil those beside it
        self.bad = torch.zeros(len(self.chunk), device=x.device).index_add(0, self.of, bad.float()) > 0

    def numbers(self, method: str, also: Mapping[str, Number]) -> tuple[Reads, dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = []
        for some, slopes, p in self.slopes(method):
            row = self.reads.row[some]
            bad = self.bad[torch.from_numpy(row).to(self.device)]
            few = max(1, (_FEW if self.device.type == "cpu" else _FEW_GPU) // slopes.shape[1])
            for i in range(0, len(row), few):
                part, q = slopes[i : i + few], p[i : i + few]
                part = part - (q * part).sum(-1, keepdim=True)
                values = {"second_order": (q * part.square()).sum(-1) / 2}
                rows = torch.from_numpy(self.chunk[row[i : i + few]])
                values |= {name: number(part, rows) for name, number in also.items()}
                found.append({name: v.masked_fill(bad[i : i + few], torch.nan) for name, v in values.items()})
        return self.reads, {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def agreement(self) -> float:
        apart, whole = 0.0, 0.0
        for (_, one, p), (_, other, _) in zip(self.slopes("forward"), self.slopes("central"), strict=True):
            apart, whole = apart + _variance(one - other, p).sum(), whole + _variance(other, p).sum()
        share = (torch.as_tensor(apart) / torch.as_tensor(whole)).sqrt()
        return 0.0 if float(apart) == float(whole) == 0.0 else float(share.nan_to_num(nan=torch.inf))

    def slopes(self, method: str) -> Iterator[tuple[slice, Slopes, Slopes]]:
        """JΔ of some reads at a time, and p; tokens without probability have slope 0."""
        states = list(self.forward() if method == "forward" else self._central())
        most = max(3, (2**24 if self.device.type == "cpu" else 2**27) // self.rows.recording.model.vocab_size)
        for start in range(0, len(self.reads.row), most):
            some = slice(start, start + most)
            p = self._clean(some)
            if method == "forward":
                with _dual():
                    logits = self._logits(fwad.make_dual(states[0][some], states[1][some]))
                    slope = fwad.unpack_dual(logits).tangent
                if slope is None:
                    raise RuntimeError("the tangent was lost on its way through the model")
                slope = slope.to(p)
            else:
                up, down = (self._logits(x[some]).to(p) for x in states[:2])
                step = states[2][torch.from_numpy(self.reads.row[some]).to(self.device)]
                slope = (up - down) / (2 * step[:, None].to(p))
            yield some, torch.where(p > 0, slope, 0.0), p

    def forward(self) -> tuple[Tensor, Tensor]:
        """Final states where effects are read, and their tangents."""
        with _dual():
            final, tangent = fwad.unpack_dual(self._final(fwad.make_dual(self.x, self.delta)))
        if tangent is None:
            raise RuntimeError("the tangent was lost on its way through the model")
        return final, tangent

    def _central(self) -> tuple[Tensor, Tensor, Tensor]:
        """Final states of steps up and down, and the length s of each row's steps."""
        x, delta = _wide(self.x), _wide(self.delta)
        square = x.new_zeros(2, len(self.chunk))
        square = square.index_add(1, self.of, torch.stack([x.square().sum(-1), delta.square().sum(-1)]))
        size, dose = square.sqrt()
        u = max(torch.finfo(self.x.dtype).eps, torch.finfo(torch.float32).eps)
        step = torch.where(dose > 0, u ** (1 / 3) * torch.where(size > 0, size, dose) / dose, 1.0)
        moved = (step[self.of][:, None] * delta).nan_to_num(0.0)
        up, down = (self._final((x + sign * moved).to(self.x)) for sign in (1, -1))
        return up, down, step

    def _final(self, vectors: Tensor | None) -> Tensor:
        """Final hidden states, or logits of full forward passes, where effects are read."""
        if self.replays:
            assert vectors is not None
            branches, found = replay_rows(self.rows, self.chunk, vectors)
            return found.hidden[upload(read_tokens(branches, self.reads), self.device)]
        edits = [] if vectors is None else self.rows.placed(self.chunk, vectors, self.branches)
        return hooked(self.rows, self.chunk, edits).logits

    def _logits(self, final: Tensor) -> Tensor:
        return unembed(self.rows.recording, final) if self.replays else final

    def _clean(self, some: slice) -> Float[Tensor, "some_read vocab"]:
        """p of some reads."""
        recording = self.rows.recording
        if not self.replays:
            return self._clean_forwards[some].softmax(-1)
        prompt = self.branches.prompt[self.reads.row[some]]
        length = recording.tokens.shape[1]
        place, index = np.unique(prompt * length + self.reads.position[some], return_inverse=True)
        logits = unembed(recording, recording.rows((FINAL,), np.stack(np.divmod(place, length)))[0])
        return _wide(logits).softmax(-1)[torch.from_numpy(index).to(self.device)]

    @cached_property
    def _clean_forwards(self) -> Float[Tensor, "read vocab"]:
        return _wide(self._final(None))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _variance(slope: Slopes, p: Slopes) -> Float[Tensor, "some_read"]:
    return (p * (slope - (p * slope).sum(-1, keepdim=True)).square()).sum(-1)


@contextmanager
def _dual() -> Iterator[None]:
    """Forward mode: attention by operations that have one."""
    with fwad.dual_level(), sdpa_kernel(SDPBackend.MATH), _Linear():
        yield


class _Linear(TorchFunctionMode):
    """Linear layers cost two products, not three: PyTorch's own formula multiplies by the weights' tangent, which is 0."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.nn.functional.linear and isinstance(args[0], Tensor) and not kwargs:
            x, tangent = fwad.unpack_dual(args[0])
            fixed = all(w is None or fwad.unpack_dual(w).tangent is None for w in args[1:])
            if tangent is not None and fixed:
                return fwad.make_dual(func(x, *args[1:]), func(tangent, args[1]))
        return func(*args, **(kwargs or {}))
