"""Sites inside a block by torch hooks set here: which module's numbers are which head's, read off each architecture's code."""

from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from interventions import Site
from tests.tiny import blocks

HEADS, D_HEAD, D_MLP = 4, 8, 64
KV_HEADS = {
    **dict.fromkeys(("llama", "qwen3", "gemma3", "gemma2", "mistral", "mistral_window", "olmo2", "granite", "phi3"), 2)
}
_ATTENTION = {
    **dict.fromkeys(("gpt2", "gpt_neo"), "attn"),
    **dict.fromkeys(("gpt_neox", "gpt_neox_sequential"), "attention"),
}
_OUT = {
    **dict.fromkeys(("gpt2",), "c_proj"),
    **dict.fromkeys(("gpt_neox", "gpt_neox_sequential", "phi"), "dense"),
    **dict.fromkeys(("opt", "opt_post_norm"), "out_proj"),
}
_DOWN = {
    "gpt2": "mlp.c_proj",
    **dict.fromkeys(("gpt_neox", "gpt_neox_sequential"), "mlp.dense_4h_to_h"),
    **dict.fromkeys(("opt", "opt_post_norm"), "fc2"),
    "phi": "mlp.fc2",
}
NAMES = (
    "llama",
    "qwen3",
    "gemma3",
    "gemma2",
    "mistral_window",
    "gpt2",
    "gpt_neox",
    "opt",
    "phi",
    "olmo2",
    "stablelm",
    "phi3",
)
"""every kind of projection (apart, joined one after another, joined head by head), norm, position and window"""


def heads(name: str, point: str) -> int:
    return KV_HEADS.get(name, HEADS) if point in ("k", "v") else HEADS


def single_heads(name: str, point: str) -> bool:
    """OLMo-2's norm of queries and of keys spans heads."""
    return not (name == "olmo2" and point in ("q", "k"))


def _columns(name: str, point: str) -> tuple[str, torch.Tensor | None]:
    """The projection that gives queries, keys or values, and which of its numbers these are, head by head."""
    kv = heads(name, "k")
    sizes = {"q": HEADS * D_HEAD, "k": kv * D_HEAD, "v": kv * D_HEAD}
    at = {"q": 0, "k": sizes["q"], "v": sizes["q"] + sizes["k"]}[point]
    if name in ("gpt2", "phi3"):
        return {"gpt2": "c_attn", "phi3": "qkv_proj"}[name], torch.arange(at, at + sizes[point])
    if name.startswith("gpt_neox"):
        every = torch.arange(3 * HEADS * D_HEAD).view(HEADS, 3, D_HEAD)
        return "query_key_value", every[:, "qkv".index(point)].reshape(-1)
    return f"{point}_proj", None


@contextmanager
def seen(name: str, hf: nn.Module, site: Site, change):
    """`change` takes all numbers of `site.whole` of a pass over one prompt, `[pos, width]`, and gives new ones."""
    block = blocks(name, hf)[site.layer]
    attention = block.get_submodule(_ATTENTION.get(name, "self_attn"))

    def before(_, args):
        return (change(args[0].reshape(-1, args[0].shape[-1])).view(args[0].shape), *args[1:])

    def after(_, __, output):
        columns = _columns(name, site.point)[1]
        whole = output.reshape(-1, output.shape[-1])
        columns = torch.arange(whole.shape[-1]) if columns is None else columns
        new = whole.clone()
        new[:, columns] = change(whole[:, columns])
        return new.view(output.shape)

    if site.point == "neurons":
        handle = block.get_submodule(_DOWN.get(name, "mlp.down_proj")).register_forward_pre_hook(before)
    elif site.point == "z":
        handle = attention.get_submodule(_OUT.get(name, "o_proj")).register_forward_pre_hook(before)
    else:
        handle = attention.get_submodule(_columns(name, site.point)[0]).register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def _put(whole: torch.Tensor, site: Site, position: int, vector) -> torch.Tensor:
    whole = whole.clone()
    if site.neurons is not None:
        whole[position, list(site.neurons)] = vector
    elif site.head is not None:
        whole[position, site.head * D_HEAD : (site.head + 1) * D_HEAD] = vector
    else:
        whole[position] = vector
    return whole


@torch.no_grad()
def forward(name: str, hf: nn.Module, tokens: list[int], edits: list[tuple[Site, int, torch.Tensor]]) -> torch.Tensor:
    """Logits `[pos, vocab]` of one full forward pass of one prompt with edits (site, position, vector).

    A pattern is edited through the z that it gives: weights times the values of the same pass.
    """
    with ExitStack() as stack:
        for site, position, vector in edits:
            if site.point == "pattern":
                kept = {}
                keep = lambda v, kept=kept: kept.setdefault("v", v)  # noqa: E731
                stack.enter_context(seen(name, hf, Site(site.layer, "v"), keep))

                def mixed(z, kept=kept, site=site, position=position, vector=vector):
                    share = HEADS // heads(name, "v")
                    value = kept["v"].view(len(tokens), -1, D_HEAD)[:, site.head // share]
                    return _put(z, Site(site.layer, "z", head=site.head), position, vector[: len(tokens)] @ value)

                stack.enter_context(seen(name, hf, Site(site.layer, "z"), mixed))
            else:
                change = lambda x, e=(site, position, vector): _put(x, *e)  # noqa: E731
                stack.enter_context(seen(name, hf, site, change))
        return hf(input_ids=torch.tensor([tokens], device=next(hf.parameters()).device)).logits[0]


@torch.no_grad()
def clean(name: str, hf: nn.Module, tokens: list[int], site: Site) -> torch.Tensor:
    """All numbers at `site.whole`, `[pos, width]` (not of a pattern)."""
    kept = []
    with seen(name, hf, site, lambda x: kept.append(x) or x):
        hf(input_ids=torch.tensor([tokens], device=next(hf.parameters()).device))
    return kept[0]
