#!/usr/bin/env python
"""Interventions a second, side by side in one run on the same rows: replay, TransformerBridge hooks, nnsight, the dense limit."""

import gc
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import DynamicCache

from diagnostics.commands import command
from diagnostics.commands.ranges import NonNegativeInt, PositiveInt, PromptLength
from interventions.effects import intervened_logits, measure
from interventions.errors import MechdiagError
from interventions.files import claim_folder, write_json
from interventions.models.causal_model import CausalModel
from interventions.models.compat import cache_name
from interventions.models.loading import load_model, resolve_device
from interventions.models.wrapping import wrap
from interventions.provenance import model_provenance
from interventions.recording import Recording, record
from interventions.replaying.hooks import hooked_logits
from interventions.replaying.replay import entering_at, unembed
from interventions.sites import Site
from interventions.texts.prompts import load_texts, tokenize

HORIZON = 8
BY_HAND = "by hand: cached keys, all blocks, a batch a prompt"
FROM_THE_LAYER = "by hand: from the recorded stream up, whole prompts, batch 32"
LAST = "replay with KL at the last position"
BATCH = 16  # prompts in one forward pass of the other tools


@dataclass(frozen=True, kw_only=True)
class BenchOptions(command.OutputOptions):
    """Interventions a second: replay against what users do today and against what the hardware allows.

    Ways: replay with KL (one edit a position, five edits a position; with the direct effect; read at 8 positions; at
    the prompt's last position; at attn_out), two scripts written by hand (whole prompts through the blocks above alone, 32 at a time, from
    the recorded stream; one token through all blocks with a cache of keys, a prompt's edits as one batch), TransformerBridge run_with_hooks and an nnsight trace in batches of 16, one-token contexts one at a time (as published;
    these five form logits only: KL is left out of their time),
    and the dense limit: as many tokens through the same blocks and the unembedding, attending to nothing. A hooked forward
    pass gives the logits of all later positions at once, so its rate is the one to compare every replay with.

    Examples:
      scripts/bench_replay.py --lengths 128 --layers 15 --out results/bench
      scripts/bench_replay.py --model YOUR_MODEL --dtypes bfloat16 --out results/yours
    """

    model: str = "smollm2-135m"
    """smollm2-135m (packaged), a folder, or a Hugging Face hub id"""
    layers: tuple[NonNegativeInt, ...] = ()
    """blocks whose output is edited, 0-based (default: one quarter, half and nine tenths of the way up)"""
    lengths: tuple[PromptLength, ...] = (128, 512)
    """tokens of the prompts"""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """float32, bfloat16, float16"""
    rows: PositiveInt = 2560
    """interventions timed for replay (a quarter of them where a dtype runs slower than float32)"""
    repeats: PositiveInt = 3
    """runs of each, of which the fastest counts"""
    device: str | None = None
    """cpu, cuda, cuda:1 (default: cuda if available)"""
    out: Path
    """folder for bench_replay.json"""


def main(options: BenchOptions) -> command.Document:
    """Run the command: one table for each dtype, with ratios of numbers from this run."""
    out = claim_folder(options.out, ["bench_replay.json"], options.overwrite)
    device = resolve_device(options.device)
    found, provenance = [], {}
    for dtype in options.dtypes:
        model = load_model(options.model, dtype=dtype, device=device)
        provenance = model_provenance(model)
        others = {
            "TransformerBridge hooks": _bridge(options.model, dtype, device),
            "nnsight trace": _nnsight(options.model, dtype, device),
        }
        for length in options.lengths:
            prompts = _prompts(model, length)
            layers = options.layers or sorted({model.n_layers // 4, model.n_layers // 2, 9 * model.n_layers // 10})
            for layer in layers:
                ways = _compare(model, others, prompts, Site(layer), dtype, options)
                options.say(_table(pd.DataFrame(ways)))
                found += ways
        del model, others
        gc.collect()
    matmul = {dtype: _matmul_rate(dtype, device) for dtype in options.dtypes}
    frame = pd.DataFrame(found)
    document = {
        "rows": frame.to_dict("records"),
        "matmul_gflops": matmul,
        "machine": _machine(),
        "provenance": {**provenance, "dtype": None},
    }
    write_json(out / "bench_replay.json", document)
    options.say("matrix products alone, GFLOP/s: " + ", ".join(f"{k} {v:.0f}" for k, v in matmul.items()))
    for line in _ratios(frame):
        options.say(line)
    options.say(f"wrote bench_replay.json into {out}")
    return {**document, "out": str(out), "files": ["bench_replay.json"]}


def _prompts(model: CausalModel, length: int) -> list[list[int]]:
    """16 prompts of exactly `length` tokens, packed from the packaged text."""
    texts = load_texts("boolq", n=3000).texts
    if model.tokenizer is None:
        raise MechdiagError("the model has no tokenizer, so it cannot read text; name another")
    stream = [
        token for prompt in tokenize(texts, model.tokenizer, max_length=10**6, n_prompts=200).tokens for token in prompt
    ]
    if len(stream) < BATCH * length:
        raise MechdiagError(f"{len(stream)} tokens of text for {BATCH} prompts of {length}; ask for shorter prompts")
    return [stream[i * length : (i + 1) * length] for i in range(BATCH)]


def _bridge(name: str, dtype: str, device: torch.device) -> CausalModel:
    from transformer_lens.model_bridge import TransformerBridge

    plain = load_model(name, dtype=dtype, device=device)  # a separate copy: a bridge changes the model it wraps
    architecture = "HuggingFaceTB/SmolLM2-135M-Instruct" if name == "smollm2-135m" else name
    return wrap(TransformerBridge.boot_transformers(architecture, hf_model=plain.hf, tokenizer=plain.tokenizer))


def _nnsight(name: str, dtype: str, device: torch.device) -> CausalModel:
    from nnsight import TransformersModel

    plain = load_model(name, dtype=dtype, device=device)
    return wrap(TransformersModel(plain.hf, task="text-generation", tokenizer=plain.tokenizer))


def _compare(
    model: CausalModel,
    others: dict[str, CausalModel],
    prompts: list[list[int]],
    site: Site,
    dtype: str,
    options: BenchOptions,
) -> list[dict[str, Any]]:
    length = len(prompts[0])
    inside = Site(site.layer, "attn_out")
    recording = record(model, prompts, [site, inside])
    n_rows = options.rows if dtype == "float32" or model.device.type == "cuda" else options.rows // 4
    generator = torch.Generator().manual_seed(0)
    found = []

    def add(way: str, n: int, run: Callable[[], object], repeats: int = options.repeats) -> float:
        seconds, peak = _time(run, repeats, model.device)
        found.append(
            {
                "dtype": dtype,
                "tokens": length,
                "layer": site.layer,
                "way": way,
                "rows_per_s": n / seconds,
                "rows_timed": n,
                "extra_memory_MiB": peak,
            }
        )
        return n / seconds

    for edits in (5, 1):
        n = n_rows // edits * edits
        token = torch.randperm(BATCH * length, generator=generator)[: n // edits].repeat_interleave(edits)
        prompt, position = token // length, token % length
        vectors = recording.at(site, prompt, position)
        vectors = vectors + torch.randn(vectors.shape, generator=generator).to(vectors)
        if edits == 5:
            effects = measure(
                recording, site, prompt[:64], position[:64], vectors[:64]
            )  # the exactness check, outside the time
            if effects.path != "replay":
                raise MechdiagError(
                    f"replay does not support this model ({effects.why_hooks}); there is nothing to compare"
                )
        add(f"replay with KL, {edits} edit{'s' * (edits > 1)} a position", n,
            lambda p=prompt, q=position, v=vectors: measure(recording, site, p, q, v, path="replay"))  # fmt: skip
    more: tuple[tuple[str, Site, int, dict[str, Any]], ...] = (
        ("replay with KL and direct effect, 1 edit a position", site, n_rows, {"metrics": ("kl", "kl_direct")}),
        (f"replay with KL at {HORIZON} positions", site, n_rows // HORIZON, {"horizon": HORIZON}),
        (LAST, site, n_rows // HORIZON, {"horizon": "last"}),
        ("replay with KL, attn_out", inside, n_rows, {}),
    )
    for way, where, n, how in more:
        token = torch.randperm(BATCH * (length - HORIZON), generator=generator)[:n]
        prompt, position = token // (length - HORIZON), token % (length - HORIZON)
        vectors = recording.at(where, prompt, position)
        vectors = vectors + torch.randn(vectors.shape, generator=generator).to(vectors)
        measure(recording, where, prompt[:64], position[:64], vectors[:64], path="replay", **how)  # its exactness check
        add(way, n, lambda p=prompt, q=position, v=vectors, w=where, o=how: measure(recording, w, p, q, v, path="replay", **o))  # fmt: skip
    by_hand = _CachedKeys(model, recording.tokens, site)
    token = torch.randperm(BATCH * length, generator=generator)[: n_rows // 4]
    prompt, position = token // length, token % length
    vectors = recording.at(site, prompt, position)
    vectors = vectors + torch.randn(vectors.shape, generator=generator).to(vectors)
    order = torch.argsort(prompt[:8], stable=True)
    eight = prompt[:8][order], position[:8][order], vectors[:8][order]
    expected = intervened_logits(recording, site, *eight).to(model.device)
    _same("cached keys", torch.cat(by_hand.logits(*eight)), expected)
    _same("from the layer", _from_the_layer(recording, site, *eight), expected)
    add(BY_HAND, len(token), lambda p=prompt, q=position, v=vectors: by_hand.logits(p, q, v))
    few = torch.arange(min(64, len(token)))
    add(FROM_THE_LAYER, len(few), lambda p=prompt, q=position, v=vectors: [
        _from_the_layer(recording, site, p[some], q[some], v[some]) for some in few.split(32)
    ])  # fmt: skip
    limit = {n: _dense(recording, site, n, options.repeats) for n in (512, 1024)}
    best = min(limit, key=lambda n: limit[n] / n)
    found.append(
        {
            "dtype": dtype,
            "tokens": length,
            "layer": site.layer,
            "way": "dense limit",
            "rows_per_s": best / limit[best],
            "rows_timed": best,
            "extra_memory_MiB": None,
        }
    )
    tokens = recording.tokens
    where = torch.randint(length // 2, length, (BATCH,), generator=generator).to(model.device)
    vector = recording.at(site, torch.arange(BATCH), where.cpu())
    for way, other in others.items():
        add(
            f"{way}, batch {BATCH}",
            BATCH,
            lambda o=other: hooked_logits(o, tokens, [(site, lambda _: vector + 1)], where),
            2,
        )
    added = recording.at(inside, torch.arange(BATCH), where.cpu())
    bridge = others["TransformerBridge hooks"]
    add(
        f"TransformerBridge hooks, attn_out, batch {BATCH}",
        BATCH,
        lambda: hooked_logits(bridge, tokens, [(inside, lambda _: added + 1)], where),
        2,
    )
    one = tokens.new_zeros(1, 1)
    at = torch.zeros(1, dtype=torch.long, device=model.device)
    add("one-token context, batch 1 (published)", 8,
        lambda: [hooked_logits(bridge, one, [(site, lambda _: vector[:1] + 1)], at) for _ in range(8)])  # fmt: skip
    return found


class _CachedKeys:
    """What one would write by hand: keys and values of each prompt kept, the edited token alone run through all blocks.

    A prompt's edits are one batch, each with the prompt's keys and a mask of those before its position; a hook on the block sets the
    vector. Unlike replay it runs the blocks below the site too, and copies a prompt's keys for every row.
    """

    @torch.no_grad()
    def __init__(self, model: CausalModel, tokens: torch.Tensor, site: Site):
        self.model, self.tokens, self.site, self.block = model, tokens, site, model.blocks[site.layer]
        self.name = cache_name(model.base) or "cache"
        cache = DynamicCache()
        model.base(input_ids=tokens, use_cache=True, **{self.name: cache})
        layers: Any = cache.layers
        self.keys: list[tuple[torch.Tensor, torch.Tensor]] = [(layer.keys, layer.values) for layer in layers]

    @torch.no_grad()
    def logits(self, prompt: torch.Tensor, position: torch.Tensor, vectors: torch.Tensor) -> list[torch.Tensor]:
        """Next-token logits of each prompt's rows, prompts ascending."""
        found = []
        for i in prompt.unique().tolist():
            rows = (prompt == i).nonzero()[:, 0]
            at = position[rows].to(self.tokens.device)
            cache = DynamicCache()
            for layer, (k, v) in enumerate(self.keys):
                cache.update(
                    k[i : i + 1].expand(len(rows), -1, -1, -1), v[i : i + 1].expand(len(rows), -1, -1, -1), layer
                )
            n = self.tokens.shape[1]
            seen = torch.arange(n + 1, device=at.device) < at[:, None]
            seen[:, n] = True  # its own key, which is appended
            mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=at.device).masked_fill(~seen, -torch.inf)
            new = vectors[rows].to(self.tokens.device)[:, None]
            setting = lambda _, __, out, new=new: (new, *out[1:]) if isinstance(out, tuple) else new  # noqa: E731
            hook = self.block.register_forward_hook(setting)
            try:
                out = self.model.base(
                    input_ids=self.tokens[i, at][:, None], attention_mask=mask[:, None, None], position_ids=at[:, None],
                    use_cache=True, **{self.name: cache},
                )  # fmt: skip
            finally:
                hook.remove()
            found.append(self.model.hf.get_output_embeddings()(out.last_hidden_state[:, 0]))
        return found


@torch.no_grad()
def _from_the_layer(
    recording: Recording, site: Site, prompt: torch.Tensor, position: torch.Tensor, vectors: torch.Tensor
) -> torch.Tensor:
    """What one would write by hand without a cache: the blocks above, from the recorded stream of whole prompts with one vector edited.

    Logits where each row was edited; those of any later token would cost the same.
    """
    model = recording.model
    stream = recording.activations[site][prompt.to(model.device)].clone()
    each, at = torch.arange(len(prompt), device=model.device), position.to(model.device)
    stream[each, at] = vectors.to(stream)
    with entering_at(recording, site.first_block, stream):
        hidden = model.base(input_ids=recording.tokens[prompt.to(model.device)], use_cache=False).last_hidden_state
    return model.hf.get_output_embeddings()(hidden[each, at])


def _same(script: str, logits: torch.Tensor, replayed: torch.Tensor) -> None:
    """Raise `MechdiagError` unless a script's logits are those of replay, to rounding."""
    off = (logits - replayed).abs().max()
    most = 1e-3 if logits.dtype == torch.float32 else 0.06
    if off > most * replayed.abs().max():
        raise MechdiagError(f"the script by hand ({script}) is off by {off:.2g}; expected replay's logits")


@torch.no_grad()
def _dense(recording: Recording, site: Site, n: int, repeats: int) -> float:
    """Seconds for n sequences of one token through the blocks above the site and the unembedding."""
    model = recording.model
    value = torch.randn(n, 1, model.d_model, device=model.device, dtype=model.dtype)
    ids = torch.zeros(n, 1, dtype=torch.long, device=model.device)

    def run() -> object:
        with entering_at(recording, site.first_block, value):
            hidden = model.base(input_ids=ids, use_cache=False).last_hidden_state
        return unembed(recording, hidden[:, 0])

    return _time(run, repeats, model.device)[0]


def _time(run: Callable[[], object], repeats: int, device: torch.device) -> tuple[float, float | None]:
    """Fastest run in seconds, and memory beyond what was held before, MiB."""
    with torch.no_grad():
        run()
        before = _reset_peak(device)
        seconds = []
        for _ in range(repeats):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    peak = _peak(device)
    return min(seconds), None if before is None or peak is None else (peak - before) / 2**20


def _reset_peak(device: torch.device) -> float | None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    except OSError:
        return None
    return _peak(device)


def _peak(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _matmul_rate(dtype: str, device: torch.device) -> float:
    """GFLOP/s of a product of the size that a block makes, for what bounds everything above."""
    kind = getattr(torch, dtype)
    a, b = torch.randn(512, 576, device=device, dtype=kind), torch.randn(1536, 576, device=device, dtype=kind)
    seconds, _ = _time(lambda: [torch.nn.functional.linear(a, b) for _ in range(50)], 3, device)
    return 50 * 2 * 512 * 576 * 1536 / seconds / 1e9


def _machine() -> dict[str, Any]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    name = next(
        (line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")),
        platform.processor(),
    )
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {"processor": name, "instructions": [f for f in wanted if f in flags], "threads": torch.get_num_threads()}


def _table(frame: pd.DataFrame) -> str:
    shown = frame.copy()
    shown["of dense limit"] = shown.rows_per_s / shown.loc[shown.way == "dense limit", "rows_per_s"].iloc[0]
    bridge = shown.loc[shown.way.str.startswith("TransformerBridge"), "rows_per_s"].iloc[0]
    shown["× bridge"] = shown.rows_per_s / bridge
    shown = shown.drop(columns=["rows_timed"])
    return shown.to_string(index=False, float_format=lambda x: f"{x:.3g}") + "\n"


def _ratios(frame: pd.DataFrame) -> list[str]:
    five = (
        frame[frame.way == "replay with KL, 5 edits a position"]
        .set_index(["tokens", "layer", "dtype"])
        .rows_per_s.unstack()
    )
    if not {"float32", "bfloat16"} <= set(five):
        return []
    dense = frame[frame.way == "dense limit"].set_index(["tokens", "layer", "dtype"]).rows_per_s.unstack()
    return [
        f"T={t} block {layer}: bfloat16 ÷ float32 {row.bfloat16 / row.float32:.2f} (dense limits: {dense.loc[t, layer].bfloat16 / dense.loc[t, layer].float32:.2f})"
        for (t, layer), row in five.iterrows()
    ]


if __name__ == "__main__":
    command.run(BenchOptions, main)
