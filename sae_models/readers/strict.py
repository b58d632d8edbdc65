"""What every reader takes from: tensors and settings, each used once, and an error for what is missing, misshaped or left over."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_models.errors import BelongingError, CheckpointError

_FLOATS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
)
"""Of weights; each but the first is widened to float32 without rounding."""
_REQUIRED = object()


class Tensors:
    """The tensors of a file, in float32 at least, so that what is folded into them is rounded once."""

    def __init__(self, values: Mapping[str, Any]):
        self._values, self._left = values, dict(values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def pair(
        self, encoder: str, decoder: str, *, encoder_columns: bool = False, decoder_columns: bool = False
    ) -> tuple[Float[Tensor, "d_sae d_model"], Float[Tensor, "d_sae d_model"]]:
        """Encoder and decoder, a row for each latent; `_columns`: the file has a column for each.

        Raises `CheckpointError` for a crosscoder (three dimensions), a transcoder (two widths), and other shapes.
        """
        W_enc, W_dec = self._tensor(encoder), self._tensor(decoder)
        if 3 in (W_enc.ndim, W_dec.ndim):
            raise CheckpointError(
                f"a crosscoder ({encoder} {tuple(W_enc.shape)}): it reads several layers; expected an SAE"
            )
        if W_enc.ndim != 2 or W_dec.ndim != 2 or 0 in (*W_enc.shape, *W_dec.shape):
            raise CheckpointError(
                f"{encoder} {tuple(W_enc.shape)}, {decoder} {tuple(W_dec.shape)}; expected two matrices"
            )
        W_enc, W_dec = (W_enc.T if encoder_columns else W_enc), (W_dec.T if decoder_columns else W_dec)
        if len(W_enc) != len(W_dec):
            raise CheckpointError(f"{encoder} has {len(W_enc)} latents and {decoder} {len(W_dec)}; expected as many")
        if W_enc.shape[1] != W_dec.shape[1]:
            raise CheckpointError(
                f"a transcoder: it reads width {W_enc.shape[1]} and writes width {W_dec.shape[1]}; expected an SAE, of one width"
            )
        return W_enc.contiguous(), W_dec.contiguous()

    def pair_by_shape(
        self, encoder: str, decoder: str, b_dec: str, transposed: bool | None, square: bool | None = None
    ) -> tuple[Float[Tensor, "d_sae d_model"], Float[Tensor, "d_sae d_model"]]:
        """Encoder and decoder of a file that does not say which way round they lie: the side as long as `b_dec` is d_model's.

        transposed: the encoder is `[d_model, d_sae]`; None: by shape. square: the same for a square one (None: not known). Raises
        `CheckpointError` where nothing says it, or shapes contradict what was given.
        """
        shapes: dict[str, tuple[int, ...]] = {
            key: tuple(getattr(self._values.get(key), "shape", ())) for key in (encoder, decoder, b_dec)
        }
        sides, d_model = (shapes[encoder], shapes[decoder]), shapes[b_dec][-1:]
        if any(len(side) != 2 for side in sides) or not d_model:
            return self.pair(encoder, decoder)  # which says what is wrong
        width = int(d_model[0])
        columns = [bool(side[0] == width and side[1] != width) for side in sides]
        if sides[0] == (width, width):
            transposed = square if transposed is None else transposed
            if transposed is None:
                raise CheckpointError(
                    f"{encoder} and {decoder} are square ({width} latents of width {width}), so shapes do not say which way round "
                    f"{encoder} lies; give transposed=False (rows are latents, [d_sae, d_model]) or transposed=True ([d_model, d_sae])"
                )
            columns[0] = transposed
        elif transposed is not None and transposed != columns[0]:
            raise CheckpointError(
                f"transposed = {transposed} was given, and {encoder} has shape {sides[0]} beside {b_dec} of {width}; leave it out"
            )
        return self.pair(encoder, decoder, encoder_columns=columns[0], decoder_columns=columns[1])

    def take(self, key: str, *shape: int) -> Tensor:
        """The tensor of this name and shape."""
        found = self._tensor(key)
        if tuple(found.shape) != shape:
            raise CheckpointError(f"{key} has shape {tuple(found.shape)}; expected {shape}")
        return found

    def vector(self, key: str) -> Float[Tensor, "entry"]:
        """A tensor of one dimension; a single number counts as one of length 1."""
        found = self._tensor(key)
        if found.ndim > 1 or found.numel() == 0:
            raise CheckpointError(f"{key} has shape {tuple(found.shape)}; expected one dimension")
        return found.reshape(-1)

    def spread(self, key: str, n: int) -> Float[Tensor, "n"]:
        """A tensor of n numbers, or a single one that counts for all."""
        found = self.vector(key)
        if len(found) not in (1, n):
            raise CheckpointError(f"{key} has shape {tuple(found.shape)}; expected {(n,)}, or one number for all")
        return found.expand(n).clone()

    def single(self, key: str) -> Float[Tensor, "1"]:
        """A single number, whatever its number of dimensions in the file."""
        found = self._tensor(key)
        if found.numel() != 1:
            raise CheckpointError(f"{key} has {found.numel()} entries; expected one")
        return found.reshape(1)

    def number(self, key: str) -> float:
        """A single number, of an integer type or not."""
        found = self._left.get(key)
        if isinstance(found, Tensor) and found.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
            self._left[key] = found.double()
        return float(self.single(key))

    def plain(self, key: str, *kinds: type, default: Any = None) -> Any:
        """A value that is no tensor, of one of these types."""
        return setting({key: self._left.pop(key)} if key in self._left else {}, key, *kinds, default=default)

    def drop(self, *keys: str) -> None:
        """Leave out what does not change the SAE's output, where it is there."""
        for key in keys:
            self._left.pop(key, None)

    def finish(self, what: str) -> None:
        """Raise `CheckpointError` where something was not used."""
        if self._left:
            raise CheckpointError(f"{_listed(self._left)}: not used by {what}; expected nothing else")

    def _tensor(self, key: str) -> Tensor:
        if key not in self._left:
            raise CheckpointError(f"no tensor {key!r} among {_listed(self._values)}; the file is not complete")
        return weights(key, self._left.pop(key))


def weights(name: str, found: Any) -> Tensor:
    """A tensor of weights, in float32 at least. Raises `CheckpointError` for what is none, and for numbers that are not finite."""
    if not isinstance(found, Tensor):
        raise CheckpointError(f"{name} is {shown(found)}; expected a tensor")
    if found.dtype not in _FLOATS or found.layout != torch.strided or found.is_meta:
        kind = "without values (on the meta device)" if found.is_meta else f"of {found.dtype}, {found.layout}"
        raise CheckpointError(f"{name} is a tensor {kind}; expected dense floating-point numbers, 8 to 64 bits")
    wide = found.detach().to(torch.float64 if found.dtype == torch.float64 else torch.float32)
    finite = wide.isfinite()
    if not bool(finite.all()):
        raise CheckpointError(
            f"{name} holds values that are not numbers ({int((~finite).sum())} of {finite.numel()} are nan or infinite); "
            "the SAE is broken"
        )
    return wide


class Options:
    """Settings given by the caller, for what a file does not say."""

    def __init__(self, given: Mapping[str, Any]):
        self._given, self._known = dict(given), set[str]()

    def take(self, name: str, in_file: Any = None) -> Any:
        """What the file says, else what was given, else None. Raises `CheckpointError` where they contradict each other."""
        self._known.add(name)
        given = self._given.get(name)
        if given is not None and in_file is not None and given != in_file:
            raise CheckpointError(f"{name} = {given!r} was given, and the file says {in_file!r}; leave it out")
        return given if in_file is None else in_file

    def need(self, name: str, in_file: Any, why: str) -> Any:
        """The same, and `CheckpointError` where neither says it."""
        found = self.take(name, in_file)
        if found is None:
            raise CheckpointError(f"{why}; give {name}=")
        return found

    def positive(self, name: str, in_file: Any, why: str) -> float:
        """A setting that is a positive finite number."""
        found = self.need(name, in_file, why)
        if not _is(found, float) or not found > 0:
            raise CheckpointError(f"{name} = {shown(found)}; expected a positive number")
        return float(found)

    def active(self, in_file: Any, d_sae: int, why: str, *, mean: bool = False) -> int | float:
        """k, the number of active latents a token: a whole number from 1 to the number of latents; mean: any number up to it."""
        k = self.need("k", in_file, why)
        if not _is(k, float) or not 0 < k <= d_sae or not (mean or k == int(k)):
            least = "above 0" if mean else "1"
            raise CheckpointError(
                f"k = {shown(k)}; expected a {'number' if mean else 'whole number'} from {least} to {d_sae}, the number of latents"
            )
        return int(k) if k == int(k) else float(k)

    def belongs(self, model_name: Any, hook_name: Any) -> tuple[str | None, str | None]:
        """Names of model and site, from the file or given. Raises `BelongingError` for a site inside attention heads."""
        found = self.take("model_name", model_name), self.take("hook_name", hook_name)
        for name, value in zip(("model_name", "hook_name"), found, strict=True):
            if value is not None and not isinstance(value, str):
                raise CheckpointError(f"{name} = {shown(value)}; expected a text")
        model_name, hook_name = found
        if hook_name is not None and re.search(r"hook_(z|q|k|v|result|pattern)$", hook_name):
            raise BelongingError(f"an SAE of {hook_name}, inside attention heads; expected one of the residual stream")
        return model_name, hook_name

    def finish(self, what: str) -> None:
        """Raise `CheckpointError` for options that the reader has no use for."""
        unknown = sorted(set(self._given) - self._known)
        if unknown:
            known = ", ".join(sorted(self._known)) or "none"
            raise CheckpointError(f"option {', '.join(unknown)} has no use for {what}; known for it: {known}")


_KINDS = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "an object",
    type(None): "null",
}


def setting(config: Mapping[str, Any], key: str, *kinds: type, default: Any = _REQUIRED) -> Any:
    """A setting of a configuration, of one of some types: str, bool, int, float (any finite number), dict, `type(None)`.

    Raises `CheckpointError` where it is missing and has no default, and where it is of another type.
    """
    if key not in config:
        if default is not _REQUIRED:
            return default
        raise CheckpointError(
            f"the configuration has no {key!r} (it has {_listed(config) or 'nothing'}); it is not complete"
        )
    value = config[key]
    if not any(_is(value, kind) for kind in kinds):
        raise CheckpointError(f"{key} = {shown(value)}; expected {' or '.join(_KINDS[kind] for kind in kinds)}")
    return value


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return (isinstance(value, float) or _is(value, int)) and abs(value) < math.inf and value == value
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def shown(value: Any) -> str:
    """A value as an error shows it, on one line and not too long."""
    if isinstance(value, (dict, list, tuple, set)):
        return f"a {type(value).__name__} of {len(value)}"
    said = repr(value) if isinstance(value, (str, bool, int, float, type(None))) else f"a {type(value).__name__}"
    return said if len(said) <= 60 else f"{said[:60]}…"


def _listed(names: Mapping[str, Any]) -> str:
    """Names, sorted."""
    return ", ".join(sorted(names))
