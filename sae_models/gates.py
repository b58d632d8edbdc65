"""Selectors with learned thresholds and gates, and their forms for latents of either sign.

A step has no gradient. A threshold learns by a straight-through estimator: by the gradient that the step would have if it were spread
over a `bandwidth` around the threshold. A gate learns by a soft copy of itself (`soft`), which is penalised and has to reconstruct.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae_models.selectors import Selector, Take, everything


class _Jump(torch.autograd.Function):
    """u·1[u > θ]; ∂u = 1[u > θ], ∂θ = −(θ/ε)·1[|u − θ| < ε/2]."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(u, threshold)
        ctx.bandwidth = bandwidth
        return u * (u > threshold)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        u, threshold = ctx.saved_tensors
        near = _near(u, threshold, ctx.bandwidth)
        return grad_outputs[0] * (u > threshold), _summed(-threshold * near * grad_outputs[0], threshold.shape), None


class _Step(torch.autograd.Function):
    """1[u > θ]; ∂u = 0, ∂θ = −(1/ε)·1[|u − θ| < ε/2]."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(u, threshold)
        ctx.bandwidth = bandwidth
        return (u > threshold).to(u)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        u, threshold = ctx.saved_tensors
        return None, _summed(-_near(u, threshold, ctx.bandwidth) * grad_outputs[0], threshold.shape), None


def _near(u: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((u - threshold).abs() < bandwidth / 2).to(u) / bandwidth


def _summed(gradient: Tensor, shape: torch.Size) -> Tensor:
    return gradient.sum_to_size(shape)


class JumpReLU(Selector):
    """z_i = ReLU(s_i)·1[s_i > θ_i]. What trained BatchTopK SAEs, Gemma Scope and others are at inference.

    Trained by the penalty λ·Σ_i 1[s_i > θ_i], with straight-through gradients for θ. Source: arXiv:2407.14435.
    """

    kind = "jumprelu"
    counts = True
    bandwidth = 0.0
    """ε, in the unit of the scores; set by training"""

    def __init__(self, threshold: Float[Tensor, "d_sae"]):
        super().__init__()
        self.threshold = nn.Parameter(threshold)

    def at(self, s: Tensor, take: Take = everything) -> Tensor:
        return self._jump(s, take(self.threshold))

    def open(self, s: Float[Tensor, "row d_sae"]) -> Bool[Tensor, "row d_sae"]:
        return self._open(s, self.threshold)

    def indicator(self, s: Tensor, take: Take = everything) -> Tensor:
        return self._step(s, take(self.threshold))

    def _jump(self, s: Tensor, threshold: Tensor) -> Tensor:
        if self.bandwidth:
            return _Jump.apply(s.relu(), threshold, self.bandwidth)
        return s.relu() * (s > threshold)

    def _step(self, s: Tensor, threshold: Tensor) -> Tensor:
        return _Step.apply(s, threshold, self.bandwidth)

    def _open(self, s: Tensor, threshold: Tensor) -> Tensor:
        return (s > threshold) | (_near(s.relu(), threshold, self.bandwidth) > 0 if self.bandwidth else False)

    @torch.no_grad()
    def constrain(self) -> None:
        for threshold in self.parameters():
            threshold.clamp_(min=0)


class BiJumpReLU(JumpReLU):
    """z_i = s_i·1[s_i > θ⁺_i] + s_i·1[s_i < −θ⁻_i], θ ≥ 0: zero inside a dead zone, signed outside.

    θ⁻ = ∞ gives JumpReLU. Source: arXiv:2605.28149 (abstract); training as for `JumpReLU`: our reconstruction.
    """

    kind = "bijumprelu"
    signed = True

    def __init__(self, threshold: Float[Tensor, "d_sae"], threshold_negative: Float[Tensor, "d_sae"]):
        super().__init__(threshold)
        self.threshold_negative = nn.Parameter(threshold_negative)

    def at(self, s: Tensor, take: Take = everything) -> Tensor:
        return self._jump(s, take(self.threshold)) - self._jump(-s, take(self.threshold_negative))

    def open(self, s: Float[Tensor, "row d_sae"]) -> Bool[Tensor, "row d_sae"]:
        return self._open(s, self.threshold) | self._open(-s, self.threshold_negative)

    def indicator(self, s: Tensor, take: Take = everything) -> Tensor:
        return self._step(s, take(self.threshold)) + self._step(-s, take(self.threshold_negative))


class Gate(Selector):
    """z_i = 1[π_i > 0]·ReLU(exp(r_i)·p_i + b_mag_i),   π_i = p_i + b_gate_i,   p the projection W_enc x_c without a bias.

    Trained by  λ Σ_i ReLU(π_i)·‖d_i‖ + ‖x − (ReLU(π) W_dec + b_dec)‖²  with W_dec and b_dec of the second term held fixed.
    Source: arXiv:2404.16014.
    """

    kind = "gated"

    def __init__(self, b_gate: Float[Tensor, "d_sae"], r_mag: Float[Tensor, "d_sae"], b_mag: Float[Tensor, "d_sae"]):
        super().__init__()
        self.b_gate, self.r_mag, self.b_mag = nn.Parameter(b_gate), nn.Parameter(r_mag), nn.Parameter(b_mag)

    def at(self, s: Tensor, take: Take = everything) -> Tensor:
        return self.magnitude(s, take).relu() * (s + take(self.b_gate) > 0)

    def open(self, s: Float[Tensor, "row d_sae"]) -> Bool[Tensor, "row d_sae"]:
        return s + self.b_gate > 0

    def soft(self, s: Tensor, take: Take = everything) -> Tensor:
        return (s + take(self.b_gate)).relu()

    def magnitude(self, s: Tensor, take: Take = everything) -> Tensor:
        return take(self.r_mag).exp() * s + take(self.b_mag)


class SignedGate(Selector):
    """A gate for each sign, one projection p and one decoder row for both:

        z_i = 1[p_i + b⁺_i > 0]·ReLU(exp(r⁺_i)·p_i + b_mag_i) − 1[−p_i + b⁻_i > 0]·ReLU(−exp(r⁻_i)·p_i + b_mag_i)
        soft gate  s_i = ReLU(p_i + b⁺_i) − ReLU(−p_i + b⁻_i)

    tied: r⁺ = r⁻. Trained as `Gate`, by |s|. Without the second half it is `Gate` (the one-sided ablation). Source:
    arXiv:2605.28149 (abstract); the equations are our reconstruction.
    """

    kind = "signed_gated"
    signed = True

    def __init__(
        self,
        b_gate: Float[Tensor, "d_sae"],
        b_gate_negative: Float[Tensor, "d_sae"],
        r_mag: Float[Tensor, "d_sae"],
        b_mag: Float[Tensor, "d_sae"],
        r_mag_negative: Float[Tensor, "d_sae"] | None = None,
    ):
        """r_mag_negative: None ties the radii."""
        super().__init__()
        self.b_gate, self.b_gate_negative = nn.Parameter(b_gate), nn.Parameter(b_gate_negative)
        self.r_mag, self.b_mag = nn.Parameter(r_mag), nn.Parameter(b_mag)
        self.r_mag_negative = None if r_mag_negative is None else nn.Parameter(r_mag_negative)

    @property
    def tied(self) -> bool:
        """Whether both signs share their radius."""
        return self.r_mag_negative is None

    def at(self, s: Tensor, take: Take = everything) -> Tensor:
        return self.magnitude(s, take)

    def open(self, s: Float[Tensor, "row d_sae"]) -> Bool[Tensor, "row d_sae"]:
        return (s + self.b_gate > 0) | (self.b_gate_negative - s > 0)

    def soft(self, s: Tensor, take: Take = everything) -> Tensor:
        return (s + take(self.b_gate)).relu() - (take(self.b_gate_negative) - s).relu()

    def magnitude(self, s: Tensor, take: Take = everything) -> Tensor:
        bias, radius = take(self.b_mag), self.r_mag if self.r_mag_negative is None else self.r_mag_negative
        up = (take(self.r_mag).exp() * s + bias).relu() * (s + take(self.b_gate) > 0)
        down = (bias - take(radius).exp() * s).relu() * (take(self.b_gate_negative) - s > 0)
        return up - down

    def settings(self) -> dict[str, object]:
        return {"kind": self.kind, "tied": self.tied}
