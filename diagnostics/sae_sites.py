"""SAEs and models joined: where an SAE belongs, and what a model does with a whole stream passed through an edit."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interventions import CausalModel, EditError, MechdiagError, Recording, ReplayError, Site, SiteError, wrap
from interventions.anatomy import at_site, check_site
from interventions.hooks import Edit, hooked_logits
from interventions.metrics import CleanSide, Comparison
from interventions.models import DEFAULT_MODEL, cache_folder
from interventions.replay import entering_at, unembed
from interventions.sites import POINTS
from interventions.trust import is_out_of_memory, logit_tolerance
from sae_models.errors import BelongingError

PATHS = ("auto", "blocks", "hooks")
_OTHER_NAMES = {"gpt2-small": "gpt2"}
"""what TransformerLens calls models that the hub calls otherwise, their owners' names apart"""


def sae_site(sae: Any, model: Any, site: Site | None = None) -> Site:
    """Where an SAE belongs in `model` (anything that `wrap` takes), read off its hook name.

    site: where it is about to be put, if that has been chosen. Raises `BelongingError` for an SAE of another width, model or
    site, `SiteError` for a hook name that is no site here (`hook_z`, `ln2.hook_normalized`, …) or that the model has not.
    Models are the same where their weights' hashes are (the SAE's in `metadata["weights_sha256"]`), however they are wrapped;
    where the SAE's is not known names are compared, without owner and case.
    """
    causal = wrap(model)
    if sae.hook_name is None:
        raise BelongingError("this SAE does not say where it belongs; set sae.hook_name, e.g. 'blocks.15.hook_resid_post'")
    try:
        own = Site.parse(sae.hook_name)
    except SiteError as error:
        raise SiteError(
            f"an SAE of {sae.hook_name!r}, which is no site here; known: {', '.join(f'blocks.N.hook_{p}' for p in POINTS)}"
        ) from error
    sae.check_belongs(d_model=causal.d_model, hook_name=None if site is None else site.hook_name)
    _check_model(sae, causal)
    check_site(causal, own)
    return own


def _check_model(sae: Any, model: CausalModel) -> None:
    known = sae.metadata.get("weights_sha256")
    if known is not None:
        if known != model.weights_hash:
            raise BelongingError(
                f"an SAE of weights {known[:12]}… ({sae.model_name}) put to weights {model.weights_hash[:12]}… ({model.name}); "
                "take one trained there, or remove sae.metadata['weights_sha256']"
            )
        return
    names = [model.name]
    if Path(model.name).parent == cache_folder() and Path(model.name).name.startswith(DEFAULT_MODEL):
        names.append(DEFAULT_MODEL)  # wrapped by hand: its configuration knows the folder alone
    names += [other for other, name in _OTHER_NAMES.items() if name == model.name.rsplit("/", 1)[-1].lower()]
    for name in names[1:]:
        try:
            return sae.check_belongs(model_name=name)
        except BelongingError:
            continue
    sae.check_belongs(model_name=model.name)


@dataclass(frozen=True)
class Spliced:
    """What a model does when the stream of every prompt passes through an edit; all tensors on the CPU, float32 (float64 for
    a float64 model)."""

    kl: dict[str, Float[Tensor, "prompt pos"]]
    """KL(clean ‖ spliced) of the next-token distribution, nats, for each edit; nan beyond the prompt's end"""
    loss: dict[str, Float[Tensor, "prompt pos"]]
    """cross-entropy of the next token, spliced, nats; nan at the prompt's last token and beyond"""
    clean_loss: Float[Tensor, "prompt pos"]
    """the same, clean"""
    path: str
    """`blocks` (the blocks above the site alone) or `hooks` (full forward passes)"""
    delta: float
    """largest logit difference seen between the two on the longest prompt (nan: not compared)"""
    why_hooks: str | None
    """why `blocks` did not serve, or None"""
    n_nonfinite: dict[str, int]
    """tokens whose KL is not finite, for each edit"""


@torch.no_grad()
def spliced(
    recording: Recording,
    site: Site,
    edits: Mapping[str, Edit],
    *,
    where: Bool[Tensor, "prompt pos"] | None = None,
    path: str = "auto",
    batch_tokens: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Spliced:
    """Pass the stream of each prompt through an edit at `site`, at all its positions, and read the effect at all of them.

    edits: by name; each is given the activations of some tokens, `[token, d_model]`, and gives as many. where: which tokens
    are edited (default: all); the effect is read at all. Each edit costs the blocks above the site and one unembedding a
    token; the clean unembedding is shared. path: `auto` (`blocks`, where the call's longest prompt gives the logits of a full
    forward pass, else `hooks`), `blocks` (an error where it does not) or `hooks`. batch_tokens: tokens that go through the blocks
    and the edit at once (default 1024 on the CPU, 8192 elsewhere). progress: called with a number of prompts when these are done.
    Raises `SiteError` for a site that the model has not or that was not recorded, `EditError` for an edit that gives another
    shape, `ReplayError`.
    """
    if path not in PATHS or (batch_tokens is not None and batch_tokens < 1):
        raise MechdiagError(f"path {path!r}, batch_tokens {batch_tokens}; expected one of {', '.join(PATHS)}, and 1 token or more")
    if not edits:
        raise EditError("no edits; give at least one by name")
    check_site(recording.model, site)
    passes = _Passes(recording, site, where)
    why, delta = (None, float("nan")) if path == "hooks" else _why_not_blocks(passes)
    if path == "blocks" and why:
        raise ReplayError(f"the blocks above {site} alone do not give what a full forward pass gives: {why}; use path='auto' or 'hooks'")
    through_blocks = path != "hooks" and why is None
    values = torch.full((1 + 2 * len(edits), *recording.tokens.shape), torch.nan, dtype=torch.promote_types(recording.model.dtype, torch.float32))
    for prompts in passes.batches(batch_tokens, through_blocks, len(edits)):
        at, found = passes.read(prompts, edits, through_blocks)
        values[:, at[0], at[1]] = found.cpu()
        if progress is not None:
            progress(len(prompts))
    clean_loss, kl, loss = values[0], values[1::2], values[2::2]
    real = torch.arange(recording.tokens.shape[1]) < recording.length[:, None]
    return Spliced(
        dict(zip(edits, kl, strict=True)),
        dict(zip(edits, loss, strict=True)),
        clean_loss,
        "blocks" if through_blocks else "hooks",
        delta,
        why,
        {name: int((~found.isfinite() & real).sum()) for name, found in zip(edits, kl, strict=True)},
    )


class _Passes:
    """Streams of a recording's prompts passed through edits, a batch of prompts at a time."""

    def __init__(self, recording: Recording, site: Site, where: Tensor | None):
        self.recording, self.site, self.model = recording, site, recording.model
        self.device, self.length = recording.tokens.device, recording.length.to(recording.tokens.device)
        real = torch.arange(recording.tokens.shape[1], device=self.device) < self.length[:, None]
        if where is not None and (where.dtype != torch.bool or where.shape != real.shape):
            raise EditError(f"where of dtype {where.dtype} and shape {list(where.shape)}; expected truth values {list(real.shape)}")
        self.edited = real if where is None else real & where.to(self.device)

    def batches(self, tokens: int | None, through_blocks: bool, n_edits: int) -> Iterator[Tensor]:
        """Prompts that go together, the longest first: what is to run out of memory does so at once."""
        cpu = self.device.type == "cpu"
        most = tokens or (1024 if cpu else 8192)
        if not through_blocks:  # all logits of a batch are held
            most = min(most, (2**27 if cpu else 2**29) // ((n_edits + 1) * self.model.vocab_size))
        order = self.recording.length.argsort(descending=True, stable=True)
        while len(order):
            size = max(1, most // int(self.recording.length[order[0]]))
            yield order[:size]
            order = order[size:]

    def read(self, prompts: Tensor, edits: Mapping[str, Edit], through_blocks: bool) -> tuple[Tensor, Tensor]:
        """(prompt, position) of each token of some prompts, and its clean loss, then KL and loss of each edit, `[number, token]`."""
        width = int(self.recording.length[prompts].max())
        which = prompts.to(self.device)
        place = (torch.arange(width, device=self.device) < self.length[which, None]).nonzero().T
        head: Callable[[Tensor], Tensor] = lambda hidden: unembed(self.recording, hidden)  # noqa: E731
        if through_blocks:
            clean = self.recording.final_hidden[which[place[0]], place[1]]
            spliced = [self.above(which, width, name, edit)[place[0], place[1]] for name, edit in edits.items()]
        else:
            head = lambda logits: logits  # noqa: E731
            clean = self.full(which, width)[place[0], place[1]]
            spliced = [self.full(which, width, name, edit)[place[0], place[1]] for name, edit in edits.items()]
        target = self.recording.tokens[which[place[0]], (place[1] + 1).clamp(max=self.recording.tokens.shape[1] - 1)]
        found = _compared(head, clean, spliced, target)
        found[0::2, place[1] + 1 == self.length[which[place[0]]]] = torch.nan  # nothing follows: no loss
        return torch.stack([prompts[place[0].cpu()], place[1].cpu()]), found

    def above(self, prompts: Tensor, width: int, name: str, edit: Edit) -> Float[Tensor, "prompt pos d_model"]:
        """Final hidden states of the stream passed through an edit, by the blocks above the site alone."""
        recording, site = self.recording, self.site
        if site.entry not in recording.activations:
            raise SiteError(f"site {site.entry} was not recorded; recorded: {', '.join(map(str, recording.activations)) or 'none'}")
        value, change = recording.activations[site.entry][prompts, :width], self.change(prompts, width, name, edit)
        with ExitStack() as stack:
            if site.entry == site:
                value = change(value)
            stack.enter_context(entering_at(recording, site.first_block, value))
            if site.entry != site:
                stack.enter_context(at_site(self.model, site, change))
            return self.model.base(input_ids=recording.tokens[prompts, :width], use_cache=False).last_hidden_state

    def full(self, prompts: Tensor, width: int, name: str = "", edit: Edit | None = None) -> Float[Tensor, "prompt pos vocab"]:
        """Logits of full forward passes with an edit at the site (none: clean), by the wrapper's own hooks."""
        tokens = self.recording.tokens[prompts, :width]
        return hooked_logits(self.model, tokens, self.site, edit and self.change(prompts, width, name, edit))

    def change(self, prompts: Tensor, width: int, name: str, edit: Edit) -> Edit:
        """`edit` at the tokens to be edited, padding left out; on whatever stands at the site, `[prompt, pos, d_model]`."""
        which = self.edited[prompts, :width].nonzero(as_tuple=True)

        def change(value: Tensor) -> Tensor:
            old = value[which]
            new = edit(old)
            if new.shape != old.shape:
                raise EditError(f"edit {name!r} gave shape {list(new.shape)}; expected {list(old.shape)}, a vector for each token")
            return value.index_put(which, new.to(value))

        return change


def _compared(
    head: Callable[[Tensor], Tensor], clean: Tensor, spliced: list[Tensor], target: Int[Tensor, "token"]
) -> Float[Tensor, "number token"]:
    """Clean loss, then KL and loss of each edit; the clean side of a token is formed once.

    With d = log q − log p, but for a constant that makes Σ p·d = 0, KL = log Σ p·exp(d), so −log q = −log p − d + KL.
    """
    parts = []
    cpu = clean.device.type == "cpu"
    for start in range(0, len(clean), many := max(1, (2**24 if cpu else 2**28) // _vocabulary(head, clean))):
        some = slice(start, start + many)
        logits = head(clean[some])
        few = max(1, 2**18 // logits.shape[1]) if cpu else len(logits)  # what fits the caches is several times faster
        sides = [CleanSide(part) for part in logits.split(few)]
        targets = target[some, None].split(few)
        clean_loss = torch.cat([-side.log_p.gather(1, t)[:, 0] for side, t in zip(sides, targets, strict=True)])
        numbers = [clean_loss]
        for hidden in spliced:
            compared = [Comparison(side, part) for side, part in zip(sides, head(hidden[some]).split(few), strict=True)]
            kl = torch.cat([c.kl for c in compared])
            change = torch.cat([c.d.gather(1, t)[:, 0] for c, t in zip(compared, targets, strict=True)])
            numbers += [kl, clean_loss - change + kl]
        parts.append(torch.stack(numbers))
    return torch.cat(parts, dim=1)
