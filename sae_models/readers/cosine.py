"""Checkpoints of arXiv:2606.15054, and plain ones of any library: a state_dict in a `.pt`, or the same keys in safetensors.

    W_enc [d_sae, d_model]  b_enc  W_dec [d_sae, d_model]  b_dec  threshold  scale_a  scale_b  (scale_a_base, scale_a_delta)

The keys and their shapes tell the variant: scale_a_base → base + delta; scale_a of 1 entry → global, of d_sae → per-feature, of
others → group; scale_b alone → pure cosine; no scales → standard; no b_enc either → magnitude bypass. Matrices are also read transposed
(W_enc [d_model, d_sae], as SAELens keeps it): the side as long as b_dec is d_model's.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sae_models.architectures import named
from sae_models.errors import CheckpointError
from sae_models.gates import JumpReLU
from sae_models.readers.stored import Stored
from sae_models.readers.strict import Options, Tensors, shown
from sae_models.sae import SAE
from sae_models.scores import Cosine, Direction, Inner, Score, unit_rows
from sae_models.selectors import BatchTopK, ReLU, Selector, TopK


def recognises(stored: Stored) -> bool:
    """Its names of the matrices."""
    return {"W_enc", "W_dec", "b_dec"} <= stored.values.keys() and stored.path.suffix != ".npz"


def read(stored: Stored, options: Options) -> SAE:
    """The SAE as its paper evaluates it: z = s·1[s > threshold]; without a threshold, TopK.

    Options: model_name, hook_name; `transposed` (needed for a standard SAE of as many latents as d_model); `subtract_b_dec=False` where x_c = x;
    `activation="relu"` for a file without threshold or k; `k` (needed without a threshold; with one it is only kept); `variant`, a name of
    `sae_models.architectures`. A magnitude bypass without `variant` is read with all three switches on, and refused where its
    rows do not have norm 1: free rows and decoding without restored norms leave no key. Nor do encoder rows that a cosine
    variant never normalises, except beside one b a latent: that is refused.
    Raises `CheckpointError` for a threshold below 0: it was never learned, and the paper's code then selects by batch.
    """
    tensors = Tensors(stored.values)
    transposed = options.take("transposed")
    if not isinstance(transposed, bool | None):
        raise CheckpointError(f"transposed = {shown(transposed)}; expected true or false")
    plain = "b_enc" in tensors and not any(key.startswith("scale_") for key in stored.values)  # of any library
    W_enc, W_dec = tensors.pair_by_shape("W_enc", "W_dec", "b_dec", transposed, None if plain else False)
    d_sae, d_model = W_dec.shape
    b_dec = tensors.take("b_dec", d_model)
    variant = options.take("variant")
    if not isinstance(variant, str | None):
        raise CheckpointError(f"variant = {shown(variant)}; expected a text")
    restore = False
    if "b_enc" in tensors:
        b_enc = tensors.take("b_enc", d_sae)
        found, score = _scored(tensors, W_enc, b_enc, variant)
        if variant is not None and variant != found:
            raise CheckpointError(f"variant {variant!r} was given, and keys and shapes say {found!r}; leave it out")
    else:
        found = variant or "bypass"
        architecture = named(found)
        if architecture.score != "direction":
            raise CheckpointError(
                f"variant {variant!r} was given, and without b_enc this is a magnitude bypass; expected bypass…"
            )
        for name, rows in (("W_enc", W_enc), ("W_dec", W_dec)) if variant is None else ():
            _check_unit(name, rows)
        restore = architecture.restore_norm
        score = Direction(W_enc, architecture.unit_encoder)
        W_dec = unit_rows(W_dec) if architecture.unit_decoder else W_dec
    selector = _selector(tensors, options, d_sae)
    subtracted = options.take("subtract_b_dec")
    if not isinstance(subtracted, bool | None):
        raise CheckpointError(f"subtract_b_dec = {shown(subtracted)}; expected true or false")
    tensors.finish(f"variant {found}")
    model_name, hook_name = options.belongs(None, None)
    return SAE(
        score,
        selector,
        W_dec,
        b_dec,
        subtract_b_dec=subtracted is not False,
        restore_norm=restore,
        metadata={"layout": "cosine", "variant": found},
        model_name=model_name,
        hook_name=hook_name,
    )


def _scored(tensors: Tensors, W_enc: Tensor, b_enc: Tensor, variant: str | None) -> tuple[str, Score]:
    d_sae = len(W_enc)
    if "scale_a_base" in tensors:
        a, delta = tensors.single("scale_a_base"), tensors.take("scale_a_delta", d_sae)
        return "cosine-delta", Cosine(W_enc, b_enc, a, _scale_b(tensors, 1, d_sae), delta)
    if "scale_a" in tensors:
        a = tensors.vector("scale_a")
        b = _scale_b(tensors, len(a), d_sae)
        if len(a) == 1 < len(b) and variant != "cosine-global":
            raise CheckpointError(
                "one exponent beside one b a latent: published with encoder rows that are not normalised, which is no cosine; "
                "where they are normalised, give variant='cosine-global'"
            )
        name = {1: "cosine-global", d_sae: "cosine-feature"}.get(len(a), f"cosine-group{len(a)}")
        return name, Cosine(W_enc, b_enc, a, b)
    if "scale_b" in tensors:
        return "cosine-pure", Cosine(W_enc, b_enc, b_enc.new_zeros(1), _scale_b(tensors, 1, d_sae), fixed=True)
    return "standard", Inner(W_enc, b_enc)


def _scale_b(tensors: Tensors, n: int, d_sae: int) -> Float[Tensor, "group"]:
    b = tensors.vector("scale_b")
    if len(b) not in (1, n, d_sae):
        raise CheckpointError(f"scale_b has {len(b)} entries; expected {', '.join(map(str, sorted({1, n, d_sae})))}")
    return b


def _check_unit(name: str, rows: Tensor) -> None:
    norms = rows.norm(dim=1)
    if not torch.allclose(norms, torch.ones_like(norms), atol=1e-3):
        raise CheckpointError(
            f"rows of {name} have norms from {norms.min():.3g} to {norms.max():.3g}; expected 1 of a magnitude bypass: "
            "give variant= (bypass-free-encoder, bypass-free-decoder, bypass-no-restore, …)"
        )


def _selector(tensors: Tensors, options: Options, d_sae: int) -> Selector:
    activation = options.take("activation")
    if activation not in (None, "relu"):
        raise CheckpointError(f"activation = {shown(activation)}; expected 'relu', for a file without threshold and k")
    if "threshold" not in tensors:
        if activation == "relu":
            return ReLU()
        why = "no threshold in the file, and nothing says its k (of a ReLU SAE give activation='relu')"
        return TopK(int(options.active(None, d_sae, why)))
    if activation is not None:
        raise CheckpointError("activation = 'relu' was given, and the file has a threshold; leave it out")
    threshold, given = tensors.spread("threshold", d_sae), options.take("k")
    if threshold.min() < 0:
        raise CheckpointError(
            f"threshold = {float(threshold.min())}: saved before it was learned; take a later checkpoint"
        )
    if given is None:
        return JumpReLU(threshold)
    if threshold.max() > threshold.min():
        raise CheckpointError(
            "k was given, and the file has a threshold for each latent, as a JumpReLU SAE; leave it out"
        )
    return BatchTopK(options.active(None, d_sae, "", mean=True), float(threshold[0]))
