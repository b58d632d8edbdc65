"""What every reader takes from: tensors and settings, each used once, and an error for what is missing, misshaped or left over."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_models.errors import BelongingError, CheckpointError


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
        if W_enc.ndim != 2 or W_dec.ndim != 2:
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

    def take(self, key: str, *shape: int) -> Tensor:
        """The tensor of this name and shape."""
        found = self._tensor(key)
        if tuple(found.shape) != shape:
            raise CheckpointError(f"{key} has shape {tuple(found.shape)}; expected {shape}")
        return found

    def vector(self, key: str) -> Float[Tensor, "entry"]:
        """A tensor of one dimension; a single number counts as one of length 1."""
        found = self._tensor(key)
        if found.ndim > 1:
            raise CheckpointError(f"{key} has shape {tuple(found.shape)}; expected one dimension")
        return found.reshape(-1)

    def number(self, key: str) -> float:
        """A single number."""
        found = self.vector(key)
        if len(found) != 1:
            raise CheckpointError(f"{key} has {len(found)} entries; expected one")
        return float(found)

    def plain(self, key: str, default: Any = None) -> Any:
        """A value that is no tensor."""
        return self._left.pop(key, default)

    def drop(self, *keys: str) -> None:
        """Leave out what does not change the SAE's output, where it is there."""
        for key in keys:
            self._left.pop(key, None)

    def finish(self, what: str) -> None:
        """Raise `CheckpointError` where something was not used."""
        if self._left:
            raise CheckpointError(f"{', '.join(sorted(self._left))}: not used by {what}; expected nothing else")

    def _tensor(self, key: str) -> Tensor:
        if key not in self._left:
            raise CheckpointError(
                f"no tensor {key!r} among {', '.join(sorted(self._values))}; the file is not complete"
            )
        found = self._left.pop(key)
        if not isinstance(found, Tensor):
            raise CheckpointError(f"{key} is a {type(found).__name__}; expected a tensor")
        if bool(found.isnan().any()):
            raise CheckpointError(f"{key} holds values that are not numbers; the SAE is broken")
        return found.to(torch.promote_types(found.dtype, torch.float32))


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

    def whole(self, name: str, in_file: Any, why: str) -> int:
        """A setting that is a positive whole number."""
        found = self.need(name, in_file, why)
        if isinstance(found, bool) or not isinstance(found, (int, float)) or found != int(found) or found < 1:
            raise CheckpointError(f"{name} = {found!r}; expected a whole number from 1 up")
        return int(found)

    def belongs(self, model_name: str | None, hook_name: str | None) -> tuple[str | None, str | None]:
        """Names of model and site, from the file or given. Raises `BelongingError` for a site inside attention heads."""
        model_name, hook_name = self.take("model_name", model_name), self.take("hook_name", hook_name)
        if hook_name is not None and re.search(r"hook_(z|q|k|v|result|pattern)$", hook_name):
            raise BelongingError(f"an SAE of {hook_name}, inside attention heads; expected one of the residual stream")
        return model_name, hook_name

    def finish(self, what: str) -> None:
        """Raise `CheckpointError` for options that the reader has no use for."""
        unknown = sorted(set(self._given) - self._known)
        if unknown:
            known = ", ".join(sorted(self._known)) or "none"
            raise CheckpointError(f"option {', '.join(unknown)} has no use for {what}; known for it: {known}")


def setting(config: Mapping[str, Any], key: str) -> Any:
    """A setting of a configuration. Raises `CheckpointError` where it is missing."""
    if key not in config:
        raise CheckpointError(
            f"the configuration has no {key!r} (it has {', '.join(config) or 'nothing'}); it is not complete"
        )
    return config[key]
