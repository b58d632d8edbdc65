"""Every causal language model class of the installed transformers, made tiny: replayed exactly, run by full passes exactly, or
refused with a `ModelError`. `python -m tests.architectures` tries all of them; `test_architectures` tries one of each kind.

"Exactly" is against plain forward passes of each prompt alone, with a torch hook on a block that is found here by running the
model. Nothing of the engine takes part in that.
"""

import collections
import warnings
from typing import NamedTuple

import torch
import transformers
from torch import nn

from interventions import ModelError, Site, SiteError, check_site, measure, record
from tests.shrunk import LAYERS, build
from tests.tiny import assert_same_effect, exact_kl

MAPPINGS = {
    "text": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    "image and text": transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
}
LEAST = {"text": 60, "image and text": 10}
"""classes that must be measured, by replay or by full passes"""
LENGTHS, ROWS, LATER, BLOCK = (24, 10), ((0, 12), (0, 23), (1, 5), (1, 9)), ((0, 20), (1, 7)), 1
MOST_PARAMETERS = 3_000_000  # a class that the shrinker leaves larger is not built

# What becomes of architectures that people use. Full passes: blocks without keys that a row could attend to, masks ignored.
REPLAYED = """
    Llama Mistral GptOss Qwen2 Qwen3 Qwen3Moe Qwen2Moe Mixtral Gemma Gemma2 Gemma3Text Phi Phi3 Phimoe GPT2 GPTNeoX OPT Falcon GPTJ CodeGen
    GPTBigCode DeepseekV2 DeepseekV3 Olmo Olmo2 Olmo3 Olmoe StableLm Granite GraniteMoe Cohere Cohere2 Starcoder2 Glm Glm4
    SmolLM3 Nemotron Persimmon BioGpt XGLM Exaone4 Ernie4_5 MiniCPM3 Llava Gemma3 Idefics3 SmolVLM Qwen2VL Qwen2_5_VL Qwen3VL
    InternVL Mistral3 Bert Roberta
"""
FULL_PASSES = """
    GPTNeo Bloom Mpt OpenAIGPT Jamba Bamba Zamba Zamba2 FalconH1 Lfm2 Qwen3Next MiniMax Mamba Mamba2 FalconMamba Rwkv
    RecurrentGemma GraniteMoeHybrid Llama4Text
"""
REFUSED = {
    "Gemma3nText": "residual stream",  # four streams side by side
    "XLNet": "residual stream",
    "XLM": "does not read what block 0 hands on",
    "Mllama": "did not run on text alone",
    "HrmText": "ran in the order",
    "PaliGemma": "not causal",  # it sees its whole prompt
    "BigBird": "not causal",
    "RemBert": "not causal",
    "Blip2": "takes no plain token ids",
    "T5Gemma2": "encoder-decoder",
    "VisionEncoderDecoder": "encoder-decoder",
}


class Outcome(NamedTuple):
    kind: str
    """`replay`, `hooks`, `refused` or `not built`; else `wrong` or `error`"""
    why: str = ""


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 70, (n,), generator=generator).tolist() for n in LENGTHS]


def edited(x: torch.Tensor) -> torch.Tensor:
    """Every other number × 1.5: larger, and in another direction, which no norm takes back."""
    return x * torch.tensor([1.5, 1.0]).repeat(x.shape[-1] // 2)


@torch.no_grad()
def logits(hf: nn.Module, ids: list[int]) -> torch.Tensor:
    return hf(input_ids=torch.tensor([ids])).logits[0]


def first(output):
    return output[0] if isinstance(output, (tuple, list)) else output


def block_that_runs(hf: nn.Module, ids: list[int]) -> nn.Module:
    """Block 1 of the outermost list of modules that ran on text, one after another, on activations of every token."""
    ran = collections.defaultdict(list)
    handles = []
    for name, module in hf.named_modules():
        for i, child in enumerate(module if isinstance(module, nn.ModuleList) else ()):

            def see(_, __, output, name=name, i=i):
                value = first(output)
                if isinstance(value, torch.Tensor) and value.ndim == 3 and value.shape[:2] == (1, len(ids)):
                    ran[name].append(i)

            handles.append(child.register_forward_hook(see))
    logits(hf, ids)
    for handle in handles:
        handle.remove()
    whole = [name for name, order in ran.items() if order == list(range(LAYERS))]
    return hf.get_submodule(min(whole, key=lambda name: name.count(".")))[BLOCK]


def alone(hf, block, ids, point, position=None):
    """Logits of every token, and what stands at the block; with a position: after what stands there was made larger."""
    seen = []

    def change(x):
        seen.append(x.clone()[0])
        x = x.clone()
        if position is not None:
            x[0, position] = edited(x[0, position])
        return x

    def before(_, args, kwargs):
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    def after(_, __, output):
        new = change(first(output))
        return type(output)((new, *output[1:])) if isinstance(output, (tuple, list)) else new

    if point == "resid_pre":
        handle = block.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = block.register_forward_hook(after)
    found = logits(hf, ids)
    handle.remove()
    return found, seen[0]


def check(hf: nn.Module) -> Outcome:
    """Measure, then compare with plain forward passes."""
    texts = prompts()
    asked = [("resid_post", ROWS, 1), ("resid_post", LATER, "last"), ("resid_pre", ROWS[:1], 1)]
    try:
        recording = record(hf, texts, [Site(BLOCK, point) for point in ("resid_pre", "resid_post")])
        found = []
        for point, rows, horizon in asked:
            site, where = Site(BLOCK, point), torch.tensor(rows).T.contiguous()
            found.append(measure(recording, site, *where, edited(recording.at(site, *where)), horizon=horizon))
    except ModelError as error:  # nothing that the engine leaves on a model may look like somebody's change
        return Outcome("error" if "changed after it was recorded" in str(error) else "refused", str(error))
    for point in ("attn_out", "resid_mid", "mlp_out"):
        try:
            check_site(hf, Site(BLOCK, point))
        except SiteError:
            continue
    other = [*texts[0][:12], *reversed(texts[0][12:])]
    if not torch.allclose(logits(hf, texts[0])[:12], logits(hf, other)[:12], rtol=1e-3, atol=1e-3):
        return Outcome("wrong", "accepted although it is not causal")
    block = block_that_runs(hf, texts[0])
    for (point, rows, horizon), effects in zip(asked, found, strict=True):
        clean, new = [], []
        for p, q in rows:
            at = -1 if horizon == "last" else q
            whole, stood = alone(hf, block, texts[p], point)
            there = recording.activations[Site(BLOCK, point)][p, : len(texts[p])]
            if not torch.allclose(there, stood, rtol=1e-4, atol=1e-4 * float(stood.abs().max())):
                return Outcome("wrong", f"{point} of prompt {p} is off by {float((there - stood).abs().max()):.1e}")
            clean.append(whole[at])
            new.append(alone(hf, block, texts[p], point, q)[0][at])
        clean, new = torch.stack(clean), torch.stack(new)
        exact = exact_kl(clean, new)
        try:
            assert_same_effect(effects["kl"], exact, 1e-4 * max(1.0, float(new.abs().max()) / 10))
        except AssertionError:
            return Outcome("wrong", f"{point}, {horizon}: {effects['kl'].tolist()}, right {exact.tolist()}")
        if float(exact.max()) < 1e-9:
            return Outcome("wrong", f"{point}, {horizon}: an edit without any effect shows nothing")
    return Outcome(found[0].path, found[0].why_hooks or "")


def mapping_of(name: str) -> str:
    return next(key for key, mapping in MAPPINGS.items() if getattr(transformers, f"{name}Config") in mapping)


def outcome(mapping: str, name: str) -> Outcome:
    """What becomes of one class."""
    config = next(config for config in MAPPINGS[mapping] if config.__name__.replace("Config", "") == name)
    model = MAPPINGS[mapping][config]
    model = model[0] if isinstance(model, (tuple, list)) else model
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of theirs while a class is built, and ours that full passes are slow
            try:
                hf = build(config, model)
            except Exception as error:
                return Outcome("not built", f"{type(error).__name__}: {error}")
            if sum(p.numel() for p in hf.parameters()) > MOST_PARAMETERS:
                return Outcome("not built", "too large")
            try:
                return check(hf)
            except Exception as error:
                return Outcome("error", f"{type(error).__name__}: {error}")
    finally:
        transformers.logging.set_verbosity(before)


def expected(name: str, found: Outcome) -> bool:
    """Whether a class ends as it should: well, and where the lists above name it as they say."""
    if name in REFUSED:
        return found.kind == "refused" and REFUSED[name] in found.why
    if name in REPLAYED.split():
        return found.kind == "replay"
    if name in FULL_PASSES.split():
        return found.kind == "hooks"
    return found.kind not in ("wrong", "error")


def main() -> int:
    """Print how many classes end in each way, and each one that ends otherwise than it should."""
    failed = False
    for mapping, least in LEAST.items():
        names = [config.__name__.replace("Config", "") for config in MAPPINGS[mapping]]
        found = {name: outcome(mapping, name) for name in names}
        counts = collections.Counter(each.kind for each in found.values())
        print(f"{mapping}: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common()))
        for name, each in found.items():
            if not expected(name, each):
                failed = True
                print(f"{name}: {each.kind}: {each.why}")
        if counts["replay"] + counts["hooks"] < least:
            failed = True
            print(f"{mapping}: fewer than {least} classes were measured")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
