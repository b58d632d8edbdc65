"""How an SAE is trained: rates, penalties and shares of the run."""

from dataclasses import dataclass

from sae_models.errors import SAEError


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
