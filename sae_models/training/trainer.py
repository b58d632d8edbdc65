"""Many SAEs trained on one stream of activations."""

import math
from collections.abc import Mapping
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
from sae_models.training.recipe import Recipe

A_QUANTILES = (5, 25, 50, 75, 95)
"""Per cent: quantiles of the exponents a_i in the metrics."""


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
