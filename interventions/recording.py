"""One clean pass, kept: activations at the sites asked for, keys and values, final hidden states."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from interventions.anatomy import at_site, check_site
from interventions.causality import check_causal
from interventions.compat import cache_name, cache_understood
from interventions.errors import MechdiagError, SiteError, TextError, is_out_of_memory, one_line
from interventions.models import CausalModel, wrap
from interventions.sites import Site
from interventions.texts import Prompts


@dataclass(eq=False)
class Recording:
    """What the clean pass over some prompts left behind.

    A position counts from the prompt's own first token, whatever padding it came with; beyond a prompt's length every
    tensor here is padding. Everything is on the model's device and in its dtype, but `length`, which is on the CPU.
    """

    model: CausalModel
    tokens: Int[Tensor, "prompt pos"]
    """token ids, right-padded with 0"""
    length: Int[Tensor, "prompt"]
    """tokens of each prompt (CPU)"""
    activations: dict[Site, Float[Tensor, "prompt pos d_model"]]
    """what stood at each site asked for, where their blocks begin (replay of sites inside a block enters there), and after
    the last block (direct effects start there)"""
    final_hidden: Float[Tensor, "prompt pos d_model"]
    """after the final norm: the unembedding makes the clean next-token distribution of it"""
    keys: list[Tensor] | None
    """per block `[prompt, kv_head, pos, d_head]`; None when the model has none or they were not asked for"""
    values: list[Tensor] | None
    blocks_return_tuple: bool = False
    """whether a block's own forward returns a tuple (transformers 4, some models of 5) or the tensor"""
    output_type: type = BaseModelOutputWithPast
    """what the model without its unembedding returns"""
    why_no_keys: str | None = None
    """why keys and values could not be kept although they were asked for, or None"""

    def check_rows(self, prompt: Tensor, position: Tensor) -> None:
        """Raise `SiteError` when a row lies outside its prompt."""
        if prompt.numel() == 0:
            raise SiteError("no rows; give at least one (prompt, position)")
        if prompt.shape != position.shape or prompt.ndim != 1:
            raise SiteError(
                f"prompts {tuple(prompt.shape)} and positions {tuple(position.shape)}; expected one of each a row"
            )
        n_prompt = len(self.length)
        absent = (prompt < 0) | (prompt >= n_prompt)
        if bool(absent.any()):
            raise SiteError(
                f"prompt {int(prompt[absent][0])} does not exist; the recording has {n_prompt} prompts, from 0"
            )
        outside = (position < 0) | (position >= self.length[prompt])
        if bool(outside.any()):
            i = int(outside.nonzero()[0])
            raise SiteError(
                f"position {int(position[i])} lies outside prompt {int(prompt[i])}, which has {int(self.length[prompt[i]])} tokens"
            )

    def at(self, site: Site, prompt: Tensor, position: Tensor) -> Float[Tensor, "row d_model"]:
        """Activations of single tokens. Raises `SiteError` for a site that was not recorded or a row outside its prompt."""
        if site not in self.activations:
            raise SiteError(
                f"site {site} was not recorded; recorded: {', '.join(map(str, self.activations)) or 'none'}"
            )
        prompt, position = prompt.cpu(), position.cpu()
        self.check_rows(prompt, position)
        values = self.activations[site]
        return values[prompt.to(values.device), position.to(values.device)]


def record(
    model: Any,
    tokens: Prompts | Sequence[Sequence[int]] | Int[Tensor, "prompt pos"],
    sites: Sequence[Site] = (),
    *,
    attention_mask: Int[Tensor, "prompt pos"] | None = None,
    keep_cache: bool = True,
    batch_prompts: int = 16,
) -> Recording:
    """One clean pass over the prompts, without forming logits.

    tokens: `Prompts`, lists of token ids of any lengths, or a tensor with its attention mask, padded on either side (padding is
    taken off: positions count from a prompt's own first token). sites: where to keep activations. `keep_cache=False`
    leaves out keys and values (no replay then). Memory: keys and values take 2 · blocks · kv_heads · d_head numbers a token.
    Raises `SiteError` for a site the model does not have, `TextError` for an empty prompt or ids outside the vocabulary.
    """
    model = wrap(model)
    check_causal(model)  # again: it may have been changed since it was wrapped
    for site in sites:
        check_site(model, site)
    kept = tuple(dict.fromkeys([*sites, *(site.entry for site in sites), Site(model.n_layers - 1)]))
    prompts = _unpadded(tokens.tokens if isinstance(tokens, Prompts) else tokens, attention_mask)
    length = torch.tensor([len(p) for p in prompts])
    ids = torch.zeros(len(prompts), int(length.max()), dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    n_embed = model.hf.get_input_embeddings().weight.shape[0]
    if int(ids.min()) < 0 or int(ids.max()) >= n_embed:
        raise TextError(
            f"token id {int(ids.min()) if int(ids.min()) < 0 else int(ids.max())} is outside the vocabulary of {n_embed}"
        )
    ids = ids.to(model.device)
    recording = Recording(model, ids, length, {}, torch.empty(*ids.shape, 0, device=ids.device), None, None)
    for start in range(0, len(prompts), batch_prompts):
        batch = slice(start, start + batch_prompts)
        width = int(length[batch].max())
        if keep_cache and recording.why_no_keys is None:
            try:
                _store(recording, batch, width, *_clean_pass(model, ids[batch, :width], kept, True))
                continue
            except (
                TypeError,
                ValueError,
                IndexError,
                RuntimeError,
                AttributeError,
                KeyError,
                NotImplementedError,
            ) as error:
                if isinstance(error, MechdiagError) or is_out_of_memory(error):
                    raise
                recording.keys = recording.values = None
                recording.why_no_keys = f"its forward pass does not take an ordinary cache ({one_line(error)})"
        _store(recording, batch, width, *_clean_pass(model, ids[batch, :width], kept, False))
    return recording


def _unpadded(tokens: Any, attention_mask: Tensor | None) -> list[Tensor]:
    if isinstance(tokens, Tensor) and attention_mask is not None:
        mask = attention_mask.bool()
        if mask.shape != tokens.shape or bool(((mask[:, 1:] != mask[:, :-1]).sum(1) > 1).any()):
            raise TextError(
                f"attention mask of shape {tuple(mask.shape)} for tokens {tuple(tokens.shape)}; "
                "expected the same shape, and each prompt's tokens side by side, padded on one side"
            )
        prompts = [row[keep].cpu() for row, keep in zip(tokens, mask, strict=True)]
    else:
        prompts = [torch.as_tensor(prompt, dtype=torch.long).cpu() for prompt in tokens]
    if not prompts or any(p.ndim != 1 or len(p) == 0 for p in prompts):
        raise TextError(f"{len(prompts)} prompts, some of them empty; expected token ids, at least one a prompt")
    return prompts


@torch.no_grad()
def _clean_pass(model: CausalModel, ids: Tensor, sites: Sequence[Site], keep_cache: bool):
    from transformers import DynamicCache

    seen: dict[Site, Tensor] = {}
    tuples: list[bool] = []
    with ExitStack() as stack:
        seen_last = lambda _, __, out: tuples.append(isinstance(out, tuple))  # noqa: E731
        stack.callback(model.blocks[-1].register_forward_hook(seen_last).remove)
        for site in sites:

            def keep(hidden: Tensor, site: Site = site) -> None:
                seen[site] = hidden

            stack.enter_context(at_site(model, site, keep))
        # No config: layers of full length, also where the model would slide.
        cache, name = DynamicCache() if keep_cache else None, cache_name(model.base)
        stack.enter_context(cache_understood(model.base))
        kept = {} if name is None else {name: cache, "use_cache": keep_cache}
        output = model.base(input_ids=ids, **kept)
    missing = [str(site) for site in sites if site not in seen]
    if missing:
        raise SiteError(f"block did not run, nothing recorded at {', '.join(missing)}")
    return seen, output, cache, tuples[0]


def _store(
    recording: Recording, batch: slice, width: int, seen: dict[Site, Tensor], output: Any, cache: Any, as_tuple: bool
) -> None:
    recording.blocks_return_tuple, recording.output_type = as_tuple, type(output)
    final = output.last_hidden_state
    shape = recording.tokens.shape

    def put(whole: Tensor | None, part: Tensor, pos_axis: int) -> Tensor:
        if whole is None:
            sizes = [shape[0], *part.shape[1:]]
            sizes[pos_axis] = shape[1]
            whole = part.new_zeros(sizes)
        whole[batch].narrow(pos_axis, 0, width).copy_(part)
        return whole

    recording.final_hidden = put(recording.final_hidden if recording.final_hidden.shape[2] else None, final, 1)
    for site, value in seen.items():
        recording.activations[site] = put(recording.activations.get(site), value, 1)
    layers = [] if cache is None else [(layer.keys, layer.values) for layer in cache.layers]
    if len(layers) != recording.model.n_layers or any(
        k is None or k.ndim != 4 or k.shape[2] != width for k, _ in layers
    ):
        return  # a model without keys and values of one a token: replay will say so
    old_keys = recording.keys or [None] * len(layers)
    old_values = recording.values or [None] * len(layers)
    recording.keys = [put(old, k, 2) for old, (k, _) in zip(old_keys, layers, strict=True)]
    recording.values = [put(old, v, 2) for old, (_, v) in zip(old_values, layers, strict=True)]
