"""The SAEs that can be trained here, by name, and how each starts."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sae_models.errors import SAEError
from sae_models.gates import BiJumpReLU, Gate, JumpReLU, SignedGate
from sae_models.normalise import normalisation
from sae_models.sae import SAE
from sae_models.scores import Aligned, Cosine, Direction, Inner, Score, Tied, norm_of, starting_scale, unit_rows
from sae_models.selectors import AbsTopK, BatchTopK, ReLU, Selector, TopK

SCORES = ("inner", "cosine", "direction", "aligned", "tied")
SELECTORS = {
    **dict.fromkeys(("topk", "batchtopk", "abstopk"), "k"),
    **dict.fromkeys(("relu", "gated", "signed_gated", "signed_gated_tied"), "l1"),
    **dict.fromkeys(("jumprelu", "bijumprelu"), "l0"),
}
"""What in a recipe says how sparse each is: a number of active latents, or the weight of a penalty."""
COUNTING = ("topk", "abstopk")
"""Selectors with as many active latents for every token."""


@dataclass(frozen=True)
class Architecture:
    """What an SAE is, before it has weights."""

    score: str = "inner"
    """inner (standard), cosine, direction (magnitude bypass), aligned, or tied (the baseline of aligned)"""
    selector: str = "batchtopk"
    """topk, batchtopk, abstopk (either sign); or, made sparse by a penalty, relu, jumprelu, bijumprelu (either sign), gated, signed_gated
    (a gate for each sign), signed_gated_tied (with one radius for both)"""
    scale: str = "delta"
    """of cosine: global (one exponent), group (one for each of `groups` slices), feature (one a latent, unconstrained),
    delta (a base and a delta a latent), pure (exponent 0)"""
    groups: int = 4
    """slices of the dictionary that share an exponent, for `group`"""
    unit_encoder: bool = True
    """of direction: encoder rows of norm 1 (the first switch of the magnitude bypass)"""
    unit_decoder: bool = True
    """decoder rows kept at norm 1; aligned SAEs leave them free"""
    restore_norm: bool = False
    """scale the decoded sum to ‖x_c‖ (the third switch of the magnitude bypass)"""
    normalise: str = "none"
    """none, layer_norm (each input first, as in arXiv:2406.04093), constant_norm (each input rescaled to norm √d_model)"""

    def __post_init__(self) -> None:
        for what, given, known in (
            ("score", self.score, SCORES),
            ("selector", self.selector, SELECTORS),
            ("scale", self.scale, ("global", "group", "feature", "delta", "pure")),
            ("input normalisation", self.normalise, ("none", "layer_norm", "constant_norm")),
        ):
            if given not in known:
                raise SAEError(f"no {what} {given!r}; known: {', '.join(known)}")
        if "gated" in self.selector and self.score != "inner":
            raise SAEError(
                f"selector {self.selector!r} with score {self.score!r}; a gate reads the inner product, without a bias"
            )
        if self.groups < 1:
            raise SAEError(f"{self.groups} groups of latents; expected at least 1")


_NAMED = {
    "standard": Architecture(),
    "cosine": Architecture("cosine"),
    "cosine-delta": Architecture("cosine"),
    "cosine-global": Architecture("cosine", scale="global"),
    "cosine-feature": Architecture("cosine", scale="feature"),
    "cosine-pure": Architecture("cosine", scale="pure"),
    "bypass": Architecture("direction", restore_norm=True),
    "bypass-free-encoder": Architecture("direction", unit_encoder=False, restore_norm=True),
    "bypass-free-decoder": Architecture("direction", unit_decoder=False, restore_norm=True),
    "bypass-free-both": Architecture("direction", unit_encoder=False, unit_decoder=False, restore_norm=True),
    "bypass-no-restore": Architecture("direction"),
    "bypass-free-encoder-no-restore": Architecture("direction", unit_encoder=False),
    "bypass-free-decoder-no-restore": Architecture("direction", unit_decoder=False),
    "bypass-free-both-no-restore": Architecture("direction", unit_encoder=False, unit_decoder=False),
    "aligned": Architecture("aligned", unit_decoder=False),
    "tied": Architecture("tied"),
    "abstopk": Architecture(selector="abstopk"),
    "jumprelu": Architecture(selector="jumprelu"),
    "gated": Architecture(selector="gated"),
    "signed-gated": Architecture(selector="signed_gated"),
    "signed-gated-tied": Architecture(selector="signed_gated_tied"),
}
NAMES = (*_NAMED, "cosine-group<G>")
"""Names that `named` knows; `:relu`, `:topk` or another of `SELECTORS` behind one picks its selector (default: batchtopk)."""


def named(name: str) -> Architecture:
    """`standard`, `cosine` (base + delta), `cosine-group4`, `aligned:topk`, …; see `NAMES`. Raises `SAEError` for others."""
    stem, _, selector = name.partition(":")
    group = re.fullmatch(r"cosine-group(\d+)", stem)
    if group:
        found = Architecture("cosine", scale="group", groups=int(group[1]))
    elif stem in _NAMED:
        found = _NAMED[stem]
    else:
        raise SAEError(
            f"no SAE {name!r}; known: {', '.join(NAMES)}, each with a selector behind it: {', '.join(':' + s for s in SELECTORS)}"
        )
    return replace(found, selector=selector) if selector else found


def build(
    architecture: Architecture,
    d_sae: int,
    k: float,
    sample: Float[Tensor, "row d_model"],
    generator: torch.Generator,
    *,
    threshold: float = 0.0,
    model_name: str | None = None,
    hook_name: str | None = None,
) -> SAE:
    """A fresh SAE, on the device of `sample`, in float32 at least.

    Decoder rows are random directions of norm 1, the encoder their copy, b_dec the geometric median of the sample (as the SAE
    sees it: normalised where it normalises), biases, radii and exponents 0, b of a cosine score by `starting_scale`. threshold: that learned thresholds, gates and the
    biases of ReLU start from.
    generator: on the CPU, so that the draw is the same on every device. Source: arXiv:2606.15054 (recipe).
    Raises `SAEError` for an empty or non-finite sample, and d_sae below the number of active latents or of groups.
    """
    sample = sample if sample.dtype == torch.float64 else sample.float()
    if len(sample) == 0 or not bool(sample.isfinite().all()):
        raise SAEError(
            f"cannot start from a sample of {len(sample)} activations, some of them not finite; give finite ones"
        )
    check_size(architecture, d_sae, k)
    normalise = normalisation(architecture.normalise)
    u = normalise(sample).u
    b_dec = geometric_median(u)
    W_dec = unit_rows(torch.randn(d_sae, sample.shape[1], generator=generator, dtype=sample.dtype)).to(sample.device)
    mean_norm = float(norm_of(u - b_dec).mean())
    score = _MAKE[architecture.score](architecture, W_dec.clone(), mean_norm)
    if "gated" in architecture.selector:
        score.b_enc = None
    elif architecture.selector == "relu" and score.b_enc is not None:
        score.b_enc.data.fill_(-threshold)  # many latents that are all open at first reconstruct x several times over
    return SAE(
        score.to(sample),
        _selector(architecture.selector, k, W_dec[:, 0], threshold),
        W_dec,
        b_dec,
        normalise=normalise,
        restore_norm=architecture.restore_norm,
        model_name=model_name,
        hook_name=hook_name,
    ).to(sample.device)


def check_size(architecture: Architecture, d_sae: int, k: float) -> None:
    """Raise `SAEError` for fewer latents than are active or share an exponent, and for TopK with a fraction of a latent."""
    if not 0 < k <= d_sae:
        raise SAEError(
            f"{d_sae} latents for k = {k} active ones a token; expected k from above 0 to the number of latents"
        )
    if architecture.scale == "group" and architecture.groups > d_sae:
        raise SAEError(f"{d_sae} latents in {architecture.groups} groups; expected at least as many latents as groups")
    if architecture.selector in COUNTING and k != round(k):
        raise SAEError(
            f"k = {k} for {'AbsTopK' if architecture.selector == 'abstopk' else 'TopK'}; expected a whole number of latents a token (BatchTopK takes a mean)"
        )


def _cosine(architecture: Architecture, W: Tensor, mean_norm: float) -> Score:
    d_sae, scale = len(W), architecture.scale
    n = {"group": architecture.groups, "feature": d_sae}.get(scale, 1)
    b = torch.full((d_sae if scale == "delta" else n,), starting_scale(mean_norm, W.shape[1]), dtype=W.dtype)
    delta = torch.zeros(d_sae, dtype=W.dtype) if scale == "delta" else None
    return Cosine(W, W.new_zeros(d_sae), W.new_zeros(n), b.to(W.device), delta, fixed=scale == "pure")


_MAKE: dict[str, Callable[[Architecture, Tensor, float], Score]] = {
    "inner": lambda _, W, __: Inner(W, W.new_zeros(len(W))),
    "cosine": _cosine,
    "direction": lambda architecture, W, _: Direction(W, architecture.unit_encoder),
    "aligned": lambda _, W, __: Aligned(W, W.new_zeros(len(W))),
    "tied": lambda _, W, __: Tied(W.new_zeros(len(W))),
}


def _selector(kind: str, k: float, latent: Tensor, threshold: float) -> Selector:
    """A fresh one, for as many latents as there are in `latent`."""
    if kind in COUNTING:
        return (AbsTopK if kind == "abstopk" else TopK)(round(k))
    if kind == "batchtopk":
        return BatchTopK(k)
    zero, start = torch.zeros_like(latent), torch.full_like(latent, threshold)
    shut = -start
    return {
        "relu": lambda: ReLU(),
        "jumprelu": lambda: JumpReLU(start),
        "bijumprelu": lambda: BiJumpReLU(start, start.clone()),
        "gated": lambda: Gate(shut, zero, zero.clone()),
        "signed_gated": lambda: SignedGate(shut, shut.clone(), zero, zero.clone(), zero.clone()),
        "signed_gated_tied": lambda: SignedGate(shut, shut.clone(), zero, zero.clone()),
    }[kind]()


@torch.no_grad()
def geometric_median(
    sample: Float[Tensor, "row d_model"], iterations: int = 100, tolerance: float = 1e-6
) -> Float[Tensor, "d_model"]:
    """The point of least total distance to a sample, by Weiszfeld's iteration, until it moves less than `tolerance` of its norm."""
    median = sample.mean(dim=0)
    for _ in range(iterations):
        weight = 1 / (sample - median).norm(dim=1).clamp(min=1e-8)
        moved = (weight[:, None] * sample).sum(dim=0) / weight.sum()
        done = (moved - median).norm() <= tolerance * moved.norm()
        median = moved
        if done:
            break
    return median
