"""Many SAEs trained on one stream of activations."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_models.architectures import Architecture, build
from sae_models.errors import SAEError
from sae_models.gates import JumpReLU
from sae_models.normalise import normalisation
from sae_models.sae import SAE
from sae_models.scores import Cosine
from sae_models.selectors import BatchTopK
from sae_models.training.objective import (
    Pass,
    active_latents,
    auxiliary_loss,
    forward_pass,
    gate_error,
    penalty,
    prefix_errors,
    token_weights,
    wider,
)

A_QUANTILES = (5, 25, 50, 75, 95)
"""Per cent: quantiles of the exponents a_i in the metrics."""


@dataclass(frozen=True)
class Recipe:
    """How an SAE is trained. Shares are of the whole run, so that short runs are short copies of long ones.

        loss = mean_t w_t·‖x − x̂‖²/σ² + aux·(AuxK loss) + multi·mean_t w_t·‖x − x̂_4k‖²/σ²       (with a selector that counts)
             + l1·mean_t Σ|z_i|‖d_i‖/σ  or  l0·mean_t Σ 1[z_i ≠ 0]  + gate·mean_t w_t·‖x − x̂_soft‖²/σ²     (with a penalty)

    σ² is the variance of the sample that the SAE starts from (summed over d_model): loss, l1 and learning rates have no unit.
    (Gradients of biases have one, and share the clipped norm; Adam divides most of that out.) An SAE that normalises its input
    is trained, and its FVE formed, on the normalised one. Source: arXiv:2606.15054 (recipe) unless a line says otherwise.
    """

    d_sae: int
    """number of latents"""
    k: float = 32
    """active latents a token (BatchTopK: on average)"""
    lr: float = 2e-3
    """of Adam, for matrices; for biases, which have the activations' unit, lr·σ/√d_model"""
    lr_scale: float = 1e-2
    """of Adam, for the exponents a and scales b of cosine scores"""
    betas: tuple[float, float] = (0.9, 0.999)
    """of Adam"""
    warm_up: float = 0.05
    """share of the steps in which the learning rate rises from 0"""
    decay_from: float = 0.8
    """share of the steps after which it falls to 0"""
    clip: float = 1.0
    """largest L2 norm of the gradient"""
    l1: float = 0.1
    """of SAEs with ReLU or a gate"""
    l0: float = 1e-3
    """of SAEs with JumpReLU: for each active latent"""
    penalty_warm_up: float = 0.0
    """share of the steps in which l1 and l0 rise from 0: latents that a penalty silences early stay dead (arXiv:2407.14435)"""
    gate: float = 1.0
    """of what a gate's soft copy leaves unexplained; 0 is the ablation of arXiv:2605.28149"""
    bandwidth: float = 0.05
    """of the gradient of learned thresholds, in units of σ (bypass: of 1, as its scores are cosines); they and gates start from it too. Source: arXiv:2407.14435, with .001 for long runs"""
    p_end: float = 1.0
    """what the power p of the L1 penalty falls to, from 1 (p-annealing, arXiv:2408.00113; there .2)"""
    anneal_from: float = 0.2
    """share of the steps after which p falls, to the end"""
    prefixes: tuple[float, ...] = ()
    """shares of the dictionary whose latents must reconstruct alone (Matryoshka, arXiv:2503.17547): the error is the mean over these and
    the whole dictionary; there (1/16, 1/8, 1/4, 1/2) and the sum"""
    aux: float = 1 / 32
    """of the AuxK loss"""
    aux_k: int | None = None
    """dead latents that explain a token's error (default: d_model/2)"""
    dead_window: float = 0.2
    """a latent that has not fired for this share of the run's tokens is dead"""
    threshold_from: float = 0.2
    """share of the steps after which the threshold of BatchTopK is learned"""
    threshold_memory: float = 0.004
    """share of the steps over which it is averaged, at least 10 steps (β = 0.999 in a run of 244,000)"""
    multi: float = 0.0
    """of the reconstruction with 4k latents; 1/8 in arXiv:2406.04093 (Multi-TopK)"""
    reweight: int = 0
    """0, or 1 or 2: weight each token's error by 1/‖x_c‖ or its square (mean weight 1)"""
    seed: int = 0
    """of the first weights"""

    def __post_init__(self) -> None:
        shares = ("warm_up", "decay_from", "dead_window", "threshold_from", "threshold_memory")
        for name in (*shares, "anneal_from", "penalty_warm_up"):
            if not 0 <= getattr(self, name) <= 1:
                raise SAEError(f"{name} = {getattr(self, name)}; expected a share of the run, from 0 to 1")
        for name in ("d_sae", "k", "lr", "lr_scale", "clip", "bandwidth"):
            if not getattr(self, name) > 0:
                raise SAEError(f"{name} = {getattr(self, name)}; expected a positive number")
        for name in ("l1", "l0", "gate", "aux", "multi", "seed"):
            if not getattr(self, name) >= 0:
                raise SAEError(f"{name} = {getattr(self, name)}; expected 0 or more")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise SAEError(f"betas = {self.betas}; expected two numbers from 0 to below 1")
        if self.aux_k is not None and self.aux_k < 1:
            raise SAEError(f"aux_k = {self.aux_k}; expected at least 1 latent, or None")
        if not 0 < self.p_end <= 1:
            raise SAEError(f"p_end = {self.p_end}; expected a power from above 0 to 1")
        if not all(1 <= share * self.d_sae < self.d_sae for share in self.prefixes):
            raise SAEError(
                f"prefixes = {self.prefixes}; expected shares of the {self.d_sae} latents below 1, of at least one latent each"
            )
        if self.reweight not in (0, 1, 2):
            raise SAEError(f"reweight = {self.reweight}; expected 0, 1 or 2, the power of 1/‖x_c‖")


class SAETraining:
    """One SAE while it is trained. `step` does all; between steps its state can be saved and put back."""

    def __init__(
        self,
        architecture: Architecture,
        recipe: Recipe,
        sample: Float[Tensor, "row d_model"],
        *,
        steps: int,
        model_name: str | None = None,
        hook_name: str | None = None,
    ):
        """sample: activations to start from (b_dec, scales). steps: of the whole run, which `recipe`'s shares refer to."""
        if steps < 1:
            raise SAEError(f"a run of {steps} steps; expected at least 1")
        generator = torch.Generator().manual_seed(recipe.seed)
        self.architecture, self.recipe, self.steps = architecture, recipe, steps
        u = normalisation(architecture.normalise)(sample if sample.dtype == torch.float64 else sample.float()).u
        self.variance = u.var(dim=0, unbiased=False).sum()
        self.sae = build(
            *(architecture, recipe.d_sae, recipe.k, sample, generator),
            threshold=recipe.bandwidth * self._score_unit(architecture.score),
            model_name=model_name,
            hook_name=hook_name,
        )
        self._spread_steps()
        units = float(self.variance.sqrt()), self._score_unit(architecture.score)
        self.optimizer = _optimizer(self.sae, recipe, *(unit / self.sae.d_model**0.5 for unit in units))
        self.done = 0
        """steps taken"""
        self.tokens = 0
        """tokens seen"""
        self.silent_for = torch.zeros(recipe.d_sae, dtype=torch.long, device=sample.device)
        """tokens since each latent last fired"""
        self._sums = self._no_sums()

    def step(self, x: Float[Tensor, "row d_model"]) -> None:
        """One step on a batch of any number of rows but none."""
        sae, recipe = self.sae, self.recipe
        if len(x) == 0:
            raise SAEError("a batch without activations; give at least one row")
        done = forward_pass(sae, x)
        loss, squared = self._loss(done)
        dead = self.silent_for > recipe.dead_window * self._tokens_in_all(len(x))
        if recipe.aux > 0 and sae.selector.sparse and bool(dead.any()):
            k = max(1, sae.d_model // 2) if recipe.aux_k is None else recipe.aux_k
            loss = loss + recipe.aux * auxiliary_loss(sae, done, dead.nonzero()[:, 0], k)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._update()
        self._keep_count(done, loss.detach(), squared.detach())

    def _loss(self, done: Pass) -> tuple[Tensor, Tensor]:
        recipe, sae = self.recipe, self.sae
        squared = done.error.square().sum(dim=-1)
        weight = token_weights(done.x_c, recipe.reweight) if recipe.reweight else torch.ones_like(squared)
        sizes = [int(share * recipe.d_sae) for share in recipe.prefixes]
        errors = [squared, *prefix_errors(sae, done, sizes)]
        loss = (weight * sum(errors)).mean() / len(errors) / self.variance
        risen = min(1.0, (self.done + 1) / max(1.0, recipe.penalty_warm_up * self.steps))
        if done.score is not None and sae.selector.counts:
            loss = loss + risen * recipe.l0 * active_latents(sae, done)
        elif done.score is not None and recipe.l1 > 0:
            loss = loss + risen * recipe.l1 * penalty(sae, done, self._power()) / self.variance.sqrt()
        if recipe.gate > 0 and (soft := gate_error(sae, done)) is not None:
            loss = loss + recipe.gate * (weight * soft).mean() / self.variance
        if recipe.multi > 0:
            more = (done.target - wider(self.sae, done, 4)).square().sum(dim=-1)
            loss = loss + recipe.multi * (weight * more).mean() / self.variance
        return loss, squared

    def _update(self) -> None:
        W_dec = self.sae.W_dec
        if self.architecture.unit_decoder:
            assert W_dec.grad is not None
            with torch.no_grad():  # what is parallel to a row would be undone by the next line but one
                W_dec.grad -= (W_dec.grad * W_dec).sum(dim=-1, keepdim=True) * W_dec
        torch.nn.utils.clip_grad_norm_([p for p in self.sae.parameters() if p.grad is not None], self.recipe.clip)
        rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * rate
        self.optimizer.step()
        self.sae.selector.constrain()
        if self.architecture.unit_decoder:
            with torch.no_grad():
                W_dec /= W_dec.norm(dim=-1, keepdim=True).clamp(min=1e-8)

    def _power(self) -> float:
        """p of the penalty at this step."""
        recipe = self.recipe
        share = (self.done / self.steps - recipe.anneal_from) / max(1e-9, 1 - recipe.anneal_from)
        return 1 + (recipe.p_end - 1) * min(1.0, max(0.0, share))

    def _rate(self) -> float:
        """The learning rate of this step as a share of the recipe's."""
        recipe, now = self.recipe, self.done + 1
        up = min(1.0, now / max(1.0, recipe.warm_up * self.steps))
        down = (self.steps - self.done) / max(1.0, (1 - recipe.decay_from) * self.steps)
        return max(0.0, min(up, down, 1.0))

    def _tokens_in_all(self, batch: int) -> float:
        return batch * self.steps if not self.done else self.tokens / self.done * self.steps

    @torch.no_grad()
    def _keep_count(self, done: Pass, loss: Tensor, squared: Tensor) -> None:
        rows, support = len(done.target), done.support
        fired = torch.zeros_like(self.silent_for, dtype=torch.bool)
        active = done.activation != 0
        if support is None:
            fired = active.any(dim=0)
        else:
            fired[support.latent[active]] = True
        self.silent_for = torch.where(fired, 0, self.silent_for + rows)
        self.done += 1
        self.tokens += rows
        selector = self.sae.selector
        if (
            isinstance(selector, BatchTopK)
            and self.done >= self.recipe.threshold_from * self.steps
            and support is not None
        ):
            self._learn_threshold(selector, selector.strength(support.score))
        variance = (done.target - done.target.mean(dim=0)).square().sum()
        for name, value in (
            ("loss", loss * rows),
            ("squared", squared.sum()),
            ("variance", variance),
            ("active", active.sum()),
        ):
            self._sums[name] = self._sums[name] + value.double()
        self._sums["rows"] = self._sums["rows"] + rows

    def _learn_threshold(self, selector: BatchTopK, strength: Tensor) -> None:
        if len(strength) == 0:
            return
        memory = max(10.0, self.recipe.threshold_memory * self.steps)
        weakest = strength.min().to(selector.threshold)
        moved = selector.threshold + (weakest - selector.threshold) / memory
        selector.threshold.copy_(torch.where(selector.threshold.isnan(), weakest, moved))

    def metrics(self) -> dict[str, float]:
        """Loss, FVE and L0 over the tokens since the last call; shares of dead latents and exponents as they stand.

        Of cosine scores: mean, standard deviation and quantiles of a_i (`a_05` … `a_95`: 5, 25, 50, 75, 95 %, linear between
        latents). Raises `SAEError` when the loss is not finite.
        """
        sums = {name: float(value) for name, value in self._sums.items()}
        self._sums = self._no_sums()
        rows = max(sums["rows"], 1.0)
        dead = self.silent_for > self.recipe.dead_window * self._tokens_in_all(0)
        found = {
            "step": self.done,
            "tokens": self.tokens,
            "loss": sums["loss"] / rows,
            "fve": 1 - sums["squared"] / sums["variance"] if sums["variance"] else math.nan,
            "l0": sums["active"] / rows,
            "dead": float(dead.double().mean()),
            "lr": self.recipe.lr * self._rate() if self.done < self.steps else 0.0,
        }
        if isinstance(self.sae.selector, BatchTopK):
            found["threshold"] = float(self.sae.selector.threshold)  # nan until it is learned
        if isinstance(self.sae.score, Cosine):
            a = self.sae.score.exponents().detach()
            spread = torch.quantile(a.double(), torch.tensor(A_QUANTILES, dtype=torch.float64, device=a.device) / 100)
            found |= {"a_mean": float(a.mean()), "a_sd": float(a.std(unbiased=False))}
            found |= {f"a_{q:02d}": value for q, value in zip(A_QUANTILES, spread.tolist(), strict=True)}
        if not math.isfinite(found["loss"]):
            raise SAEError(
                f"the loss is {found['loss']} at step {self.done}; lower lr ({self.recipe.lr}) or look at the activations"
            )
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: tensors and plain values."""
        return {
            "sae": self.sae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "variance": self.variance,
            "silent_for": self.silent_for,
            "done": self.done,
            "tokens": self.tokens,
            "sums": dict(self._sums),
            "hint": self.sae.selector._hint if isinstance(self.sae.selector, BatchTopK) else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, exactly."""
        self.sae.load_state_dict(state["sae"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.variance, self.silent_for = state["variance"].to(self.sae.device), state["silent_for"].to(self.sae.device)
        self.done, self.tokens = state["done"], state["tokens"]
        self._sums = {name: value.to(self.sae.device) for name, value in state["sums"].items()}
        if isinstance(self.sae.selector, BatchTopK):
            self.sae.selector._hint = state["hint"]
        self._spread_steps()

    def _spread_steps(self) -> None:
        if isinstance(self.sae.selector, JumpReLU):
            self.sae.selector.bandwidth = self.recipe.bandwidth * self._score_unit(self.architecture.score)

    def _score_unit(self, score: str) -> float:
        """σ; 1 for scores that are cosines."""
        return 1.0 if score == "direction" else float(self.variance.sqrt())

    def _no_sums(self) -> dict[str, Tensor]:
        zero = torch.zeros((), dtype=torch.float64, device=self.sae.device)
        return dict.fromkeys(("loss", "squared", "variance", "active", "rows"), zero)


def _optimizer(sae: SAE, recipe: Recipe, unit: float, score_unit: float) -> torch.optim.Adam:
    """Adam moves every number by about its learning rate; biases have the unit of the activations, and so has theirs; thresholds the
    scores'.
    """
    rates = {
        "matrix": recipe.lr,
        "bias": recipe.lr * unit,
        "scale": recipe.lr_scale,
        "threshold": recipe.lr * score_unit,
    }
    groups: dict[str, list[Tensor]] = {kind: [] for kind in rates}
    for name, parameter in sae.named_parameters():
        kind = "scale" if ".scale_" in name or ".r_mag" in name else "matrix" if parameter.ndim == 2 else "bias"
        kind = "threshold" if ".threshold" in name else kind
        if parameter.requires_grad:
            groups[kind].append(parameter)
    return torch.optim.Adam(
        [{"params": found, "base": rates[kind]} for kind, found in groups.items() if found],
        lr=recipe.lr,
        betas=recipe.betas,
        fused=True,
    )
