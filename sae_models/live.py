"""An SAE object of another library, as one of ours."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_models.errors import SAEError
from sae_models.loading import load_sae
from sae_models.readers import saelens
from sae_models.readers.stored import Stored, unwrapped
from sae_models.readers.strict import Options, weights
from sae_models.sae import SAE
from sae_models.scores import Score
from sae_models.selectors import Selector


def as_sae(thing: Any, **options: Any) -> SAE:
    """Our SAE as it is; the SAE of a path or name, as `load_sae` reads it; a SAELens object read as the folder it would be saved as;
    another object with `encode`, `decode` and `W_dec` wrapped, where its decoding is linear.

    What is adapted is a copy, on the object's device and in its dtype: later changes of the object's weights do not follow, and
    changes of the copy leave the object alone. A SAELens SAE in training becomes what it would be saved as for inference.
    options: settings that the object does not carry (model_name, hook_name, …), as of `load_sae`.
    Raises `CheckpointError` for a SAELens object that cannot be read exactly, `SAEError` for an object of another shape, with a
    decoding that is not linear or keeps state, or with latents that depend on what else is in the batch.
    """
    if isinstance(thing, SAE):
        return thing
    if isinstance(thing, str | Path):
        return load_sae(thing, **options)
    given = Options(options)
    thing = _inside(thing)
    config = _saelens_config(thing)
    sae = _wrapped(thing, given) if config is None else _read(thing, config, given)
    given.finish("a live object")
    return sae.requires_grad_(False)


def _inside(thing: Any) -> Any:
    """What a wrapper for several devices holds; torch.compile's shows all that it holds itself."""
    return thing.module if isinstance(thing, nn.parallel.DataParallel | nn.parallel.DistributedDataParallel) else thing


def _saelens_config(thing: Any) -> dict[str, Any] | None:
    to_dict = getattr(getattr(thing, "cfg", None), "to_dict", None)
    config = to_dict() if callable(to_dict) and callable(getattr(thing, "state_dict", None)) else None
    return config if isinstance(config, dict) and "architecture" in config else None


def _read(thing: nn.Module, config: dict[str, Any], options: Options) -> SAE:
    what = f"a live {type(thing).__name__}"
    values = unwrapped({key: value.detach().clone() for key, value in thing.state_dict().items()}, what)
    try:
        sae = saelens.read(Stored(Path(what), copy.deepcopy(config), values), options)
    except SAEError as error:
        raise type(error)(f"{what}: {error}") from error.__cause__
    dtype = values["W_dec"].dtype
    return sae.to(
        values["W_dec"].device, dtype if dtype.itemsize > 1 else torch.float32
    )  # float8 cannot be computed in


class Wrapped(Score):
    """The encoder of another library, kept as a function of x; it has no rows that can be asked for."""

    kind = "wrapped"

    def __init__(self, original: Any):
        nn.Module.__init__(self)
        self.original = original

    def forward(
        self, x_c: Float[Tensor, "*row d_model"], W_dec: Float[Tensor, "d_sae d_model"]
    ) -> Float[Tensor, "*row d_sae"]:
        return self.original.encode(x_c.reshape(-1, x_c.shape[-1])).reshape(*x_c.shape[:-1], len(W_dec))

    def rows(self, W_dec: Tensor) -> Tensor:
        raise SAEError(
            f"the encoder of a {type(self.original).__name__} is known as a function only; it has no rows to show"
        )

    @property
    def W_enc(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rows(torch.empty(0))


class Unselected(Selector):
    """z = s: the wrapped encoder has selected."""

    kind = "wrapped"

    def value(self, s: Tensor) -> Tensor:
        return s

    def strength(self, s: Tensor) -> Tensor:
        return s.abs()


@torch.no_grad()
def _wrapped(thing: Any, options: Options) -> SAE:
    what = type(thing).__name__
    W_dec = _decoder_of(thing)
    if W_dec is None or not callable(getattr(thing, "encode", None)) or not callable(getattr(thing, "decode", None)):
        raise SAEError(
            f"a {what} has no encode, decode and W_dec [d_sae, d_model]; save it and use load_sae, or wrap it so"
        )
    if W_dec.dtype.itemsize < 2:
        raise SAEError(f"a {what} of {W_dec.dtype}, in which nothing can be computed; convert it to float32 first")
    weights(f"W_dec of a {what}", W_dec)
    thing, W_dec = copy.deepcopy(thing), W_dec.detach().clone()
    named = thing.named_parameters() if hasattr(thing, "named_parameters") else ()
    for name, value in named:
        weights(f"{name} of a {what}", value)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(W_dec)

    x, z = drawn(16, W_dec.shape[1]), drawn(16, len(W_dec)).abs()
    latents = thing.encode(x)
    if not isinstance(latents, Tensor) or latents.shape != z.shape:
        raise SAEError(f"encode of a {what} gives {_shown(latents)}; expected latents {tuple(z.shape)} for 16 inputs")
    if not bool(latents.isfinite().all()):
        raise SAEError(
            f"encode of a {what} gives latents that are not finite; expected finite ones: look at its weights"
        )
    if not _close(latents[:4], thing.encode(x[:4])):
        raise SAEError(f"latents of a {what} depend on what else is in the batch; set it to what it does at inference")
    b_dec = _linear_offset(thing.encode, thing.decode, W_dec, x, z)
    if b_dec is None:
        raise SAEError(
            f"decoding of a {what} is not z @ W_dec + a constant (or depends on the last encode); expected linear"
        )
    model_name, hook_name = options.belongs(getattr(thing, "model_name", None), getattr(thing, "hook_name", None))
    return SAE(
        Wrapped(thing),
        Unselected(),
        W_dec,
        b_dec,
        subtract_b_dec=False,
        model_name=model_name,
        hook_name=hook_name,
        metadata={"wrapped": what},
    )


def _decoder_of(thing: Any) -> Tensor | None:
    W_dec = getattr(thing, "W_dec", None)
    if W_dec is None and isinstance(getattr(thing, "decoder", None), nn.Linear):
        W_dec = thing.decoder.weight.T  # as dictionary_learning keeps it
    return W_dec if isinstance(W_dec, Tensor) and W_dec.ndim == 2 else None


def _linear_offset(
    encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], W_dec: Tensor, x: Tensor, z: Tensor
) -> Float[Tensor, "d_model"] | None:
    """What is decoded from no latents, where decoding is linear in them and the same whatever was encoded last."""
    encode(x)
    b_dec = decode(torch.zeros_like(z))
    encode(2 * x.flip(0) + 1)
    linear = _close(decode(z), z @ W_dec + b_dec) and _close(b_dec, b_dec[:1].expand_as(b_dec))
    return b_dec[0].clone() if linear else None


def _close(a: Tensor, b: Tensor) -> bool:
    # two orders of summing a few thousand terms differ by less than this share of the largest
    tolerance = 100 * torch.finfo(a.dtype).eps
    return a.shape == b.shape and bool(((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-30)).item())


def _shown(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
