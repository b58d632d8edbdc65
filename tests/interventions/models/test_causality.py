"""Models in which a later token changes an earlier activation are refused, however they came to be so; decoders are not."""

import gc
import threading
import weakref

import pytest
import torch
import transformers
from torch import nn

from interventions import ModelError, edit_in_trace, load_model, measure, record, wrap
from interventions.models.causality import _seen, check_causal
from interventions.sites import Site
from tests.shrunk import build
from tests.tiny import D_MODEL, HOOKED, REPLAYED, VOCAB, bridge, fresh, prompts, tiny_model, traced

NOT_CAUSAL = "it is not causal: later tokens change earlier activations by .*; expected a decoder"


def _made_bidirectional(which):
    if which == "all":
        hf = fresh("llama")
        for layer in hf.model.layers:
            layer.self_attn.is_causal = False
    elif which == "last":
        hf = fresh("qwen3")
        hf.model.layers[-1].self_attn.is_causal = False
    elif which == "mask":  # as LLM2Vec does
        hf = fresh("gpt2")
        attention = hf.transformer.h[2].attn
        own = attention.forward
        attention.forward = lambda x, *args, attention_mask=None, **kwargs: own(
            x, *args, attention_mask=x.new_zeros(1, 1, x.shape[1], x.shape[1]), **kwargs
        )
    elif which == "hook":
        hf = fresh("opt")
        hf.model.decoder.layers[1].register_forward_hook(mixes)
    return hf


def mixes(_, __, out):
    """A hook that takes the mean over positions off what a block hands on."""
    x = out[0] if isinstance(out, tuple) else out
    x = x - x.mean(1, keepdim=True)
    return (x, *out[1:]) if isinstance(out, tuple) else x


@pytest.mark.parametrize("which", ["all", "last", "mask", "hook"])
def test_decoders_made_bidirectional_are_refused(which):
    hf = _made_bidirectional(which)
    for use in (wrap, load_model, lambda hf: record(hf, prompts((5, 3)))):
        with pytest.raises(ModelError, match=NOT_CAUSAL):
            use(hf)


@pytest.mark.parametrize("name", ["Bert", "ModernBert"])
def test_masked_language_models_are_refused(name):
    model = getattr(transformers, f"{name}ForMaskedLM")
    hf = build(getattr(transformers, f"{name}Config"), model, is_decoder=False)
    with pytest.raises(ModelError, match=f"cannot use {model.__name__}: {NOT_CAUSAL}"):
        wrap(hf)


@pytest.mark.parametrize("is_decoder", [True, False])
def test_encoders_are_accepted_only_as_decoders(is_decoder):
    """One configuration setting decides whether the same class is causal."""
    kind = transformers.RobertaConfig
    hf = build(kind, transformers.MODEL_FOR_CAUSAL_LM_MAPPING[kind], is_decoder=is_decoder)
    if is_decoder:
        assert wrap(hf).n_layers == 4
        return
    with pytest.raises(ModelError, match=NOT_CAUSAL):
        wrap(hf)


DTYPES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in (*REPLAYED, *HOOKED)),
        *((name, DTYPES[i % 2]) for i, name in enumerate((*REPLAYED, *HOOKED))),
        ("mamba", torch.bfloat16),
    ],
    ids=str,
)
def test_decoders_are_accepted_in_every_dtype(name, dtype):
    shapes = check_causal(wrap(tiny_model(name, dtype=dtype)))
    assert shapes[:3] == (D_MODEL, torch.float32 if name == "mamba" and dtype.itemsize == 2 else dtype, VOCAB)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("Mixtral", torch.float32), ("Qwen3Moe", torch.bfloat16), ("DeepseekV3", torch.float32)],
    ids=str,
)
def test_mixture_of_experts_models_are_accepted(name, dtype):
    kind = getattr(transformers, f"{name}Config")
    wrap(build(kind, transformers.MODEL_FOR_CAUSAL_LM_MAPPING[kind]).to(dtype))


def test_models_without_one_residual_stream_are_refused():
    hf = fresh("llama")

    class Doubled(type(hf.model.layers[2])):
        def __call__(self, hidden_states, *args, **kwargs):
            return super().__call__(2 * hidden_states, *args, **kwargs)

    hf.model.layers[2].__class__ = Doubled
    with pytest.raises(ModelError, match="its block 2 does not read what block 1 hands on"):
        wrap(hf)
    hf = fresh("llama")
    hf.model.layers[2].register_forward_hook(lambda _, __, out: torch.cat([out, out], -1))
    with pytest.raises(ModelError, match="cannot use LlamaForCausalLM: its "):
        wrap(hf)


def test_hooks_before_a_block_are_accepted():
    hf = fresh("llama")
    hf.model.layers[2].register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    assert wrap(hf).shapes is not None


def test_a_model_that_is_cast_or_resized_is_checked_again():
    model = wrap(fresh("llama"))
    for dtype in (torch.float64, torch.bfloat16):
        model.hf.to(dtype)
        assert record(model, [[1, 2, 3]]).model.stream_dtype == dtype
    model.hf.float().resize_token_embeddings(50)
    recording = record(model, [[1, 2, 3]], [Site(2)])
    assert model.vocab_size == 50
    at = torch.tensor([0]), torch.tensor([1])
    assert measure(recording, Site(2), *at, 2 * recording.at(Site(2), *at)).path == "replay"


def test_failing_forward_passes_raise_a_model_error():
    hf = fresh("llama")
    hf.model.norm.forward = lambda x: 1 / 0
    with pytest.raises(
        ModelError, match=r"its forward pass takes no plain token ids \(ZeroDivisionError: division by zero\)"
    ):
        wrap(hf)
    del hf.model.norm.forward
    wrap(hf)  # asked again


def test_model_is_checked_again_only_after_a_change():
    hf, passes = fresh("llama"), []
    hf.lm_head.register_forward_hook(lambda *_: passes.append(1))
    for _ in range(3):
        wrap(hf)
    assert len(passes) == 1
    hf.model.layers[0].self_attn.is_causal = False
    for _ in range(2):
        with pytest.raises(ModelError, match=NOT_CAUSAL):
            wrap(hf)
    hf.model.layers[0].self_attn.is_causal = True
    asked = len(passes)
    wrap(hf)
    hf.set_attn_implementation("eager")
    hf.model.layers[0].self_attn.is_causal = False
    wrap(hf)  # eager attention always takes a mask
    assert len(passes) == asked + 1
    hf.model.layers = nn.ModuleList(hf.model.layers[:4])
    assert wrap(hf).shapes is not None and len(passes) == asked + 2
    gone = weakref.ref(hf)
    assert hf in _seen
    del hf
    gc.collect()
    assert gone() is None


def test_model_made_bidirectional_after_wrapping_is_refused():
    hf = fresh("llama")
    model = wrap(hf)
    record(model, prompts((5, 3)))
    hf.model.layers[4].self_attn.is_causal = False
    with pytest.raises(ModelError, match=NOT_CAUSAL):
        record(model, prompts((5, 3)))


def test_models_are_checked_while_other_threads_run_them():
    hf, ids = fresh("llama"), torch.tensor([prompts((24,))[0]])
    stop = threading.Event()

    def run():
        while not stop.is_set():
            hf(input_ids=ids)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(8):
            _seen.pop(hf, None)
            assert wrap(hf).shapes[:3] == (D_MODEL, torch.float32, VOCAB)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_the_check_leaves_the_model_unchanged():
    hf = fresh("llama").requires_grad_(True)
    before = {name: set(vars(m)) for name, m in hf.named_modules()}
    wrap(hf)
    assert {name: set(vars(m)) for name, m in hf.named_modules()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hf.modules())
    assert all(p.grad is None for p in hf.parameters())


@pytest.mark.parametrize(
    "wrapper", [pytest.param(lambda hf: bridge("llama", hf), marks=pytest.mark.bridge, id="bridge"), traced]
)
def test_wrapped_models_are_checked_too(wrapper):
    handle = wrapper(fresh("llama"))
    inner = wrap(handle).hf
    assert wrap(handle).shapes[:3] == (D_MODEL, torch.float32, VOCAB)
    inner.model.layers[3].register_forward_hook(mixes)
    _seen.pop(inner)  # hooks set later are not looked for
    with pytest.raises(ModelError, match=NOT_CAUSAL):
        wrap(handle)


def test_model_first_seen_inside_a_trace_is_checked_later():
    hf = fresh("llama")
    model, ids = traced(hf), torch.tensor([prompts((7,))[0]])
    with model.trace(ids):
        edit_in_trace(model, Site(2), lambda x: x * 2, position=3)
        changed = model.output.logits.save()
    assert hf not in _seen or not _seen[hf]
    clean = tiny_model("llama")(input_ids=ids).logits
    assert torch.allclose(changed[0, :3], clean[0, :3], atol=1e-4) and not torch.allclose(changed, clean, atol=0.1)
    assert wrap(model).shapes[:3] == (D_MODEL, torch.float32, VOCAB)
