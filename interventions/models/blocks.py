"""Where a model's blocks are, found by the structure of its modules: those of the language model, whatever other towers there are."""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from interventions.errors import ModelError
from interventions.models.compat import forward_parameters


def find_blocks(hf: PreTrainedModel, n: int | None) -> tuple[nn.Module, list[nn.Module]]:
    """The part of a model without its unembedding, and its blocks: the first list of `n`, the configuration's number.

    A model whose blocks were removed by hand has no list of that length; then the longest of the outermost lists is taken.
    `check_causal` tells whether a forward pass runs them. Raises `ModelError` when there is no list of modules.
    """
    # `get_decoder` guesses by name, and some models call their unembedding a decoder.
    lists = list(_lists(hf.get_decoder())) or list(_lists(hf))
    found = next((x for x in lists if len(x[1]) == n), None) or max(
        lists, key=lambda x: (-len(x[0]), len(x[1])), default=None
    )
    if found is None:
        raise ModelError(f"no list of blocks found in {type(hf).__name__}; known: decoder-only causal models")
    around, blocks = found
    # The innermost module around them that takes token ids: what owns the list may take hidden states (BERT's encoder).
    base = next((m for m in reversed(around) if "input_ids" in forward_parameters(type(m))), around[-1])
    return base, list(blocks)


def _lists(tower: nn.Module) -> Iterator[tuple[tuple[nn.Module, ...], nn.ModuleList]]:
    """Lists of modules from the outside in, each with the modules around it; none inside a list or a tower for images or sounds."""
    waiting: list[tuple[nn.Module, ...]] = [(tower,)]
    while waiting:
        around = waiting.pop(0)
        for child in around[-1].children():
            if isinstance(child, nn.ModuleList):
                if len(child):
                    yield around, child
            elif not isinstance(child, PreTrainedModel) or child.main_input_name == "input_ids":
                waiting.append((*around, child))
