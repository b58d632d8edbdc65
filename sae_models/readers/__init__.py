"""Readers of published formats, one a module. Each turns an opened file into an SAE that decodes as the original does."""

from collections.abc import Callable
from typing import NamedTuple

from sae_models.errors import CheckpointError, SAEError
from sae_models.readers import cosine, dictionary_learning, gemma_scope, openai, own, saelens, sparsify
from sae_models.readers.stored import Stored
from sae_models.readers.strict import Options
from sae_models.sae import SAE


class Layout(NamedTuple):
    """A format of files."""

    recognises: Callable[[Stored], bool]
    """from file names, configuration and keys"""
    read: Callable[[Stored, Options], SAE]
    """raises `CheckpointError` for what it cannot read exactly"""


LAYOUTS: dict[str, Layout] = {
    module.__name__.rpartition(".")[2]: Layout(module.recognises, module.read)
    for module in (own, saelens, sparsify, gemma_scope, openai, dictionary_learning, cosine)
}
"""By name, in the order in which they are asked."""


def read(stored: Stored, options: Options, layout: str | None = None) -> SAE:
    """The SAE in an opened file. Raises `CheckpointError` for files of no layout known here; errors name the file."""
    if layout is None:
        layout = next((name for name, known in LAYOUTS.items() if known.recognises(stored)), None)
    if layout is None:
        keys = ", ".join(sorted(stored.values)[:12])
        raise CheckpointError(f"{stored.path} is of no layout known here (keys {keys}); known: {', '.join(LAYOUTS)}")
    if layout not in LAYOUTS:
        raise CheckpointError(f"no layout {layout!r}; known: {', '.join(LAYOUTS)}")
    try:
        sae = LAYOUTS[layout].read(stored, options)
        options.finish(f"a file of layout {layout}")
    except SAEError as error:
        raise type(error)(f"{stored.where}: {error}") from error.__cause__
    return sae
