"""Ctrl-C leaves the model as it was: no hook, no replaced forward, no way of attending; and the next call gives the same bits."""

import functools

import pytest
import torch

from interventions import Site, intervened_logits, measure, record, wrap
from interventions.activations import ActivationStream
from interventions.attribution import gradients
from tests.interrupted import at_line, at_module, left_on, restoring
from tests.tiny import bridge, edited, fresh, prompts, rows, traced

WRAPPERS = ("huggingface", pytest.param("transformer_lens", marks=pytest.mark.bridge), "nnsight")
PROMPTS = prompts((12, 9))
PROMPT, POSITION = rows(((0, 7), (1, 3), (0, 11)))
SITE = Site(2, "attn_out")
LINES = {
    ("anatomy.py", "_at"),
    ("anatomy.py", "at_site"),
    ("exclusive.py", "attending_by"),
    ("exclusive.py", "forward_replaced"),
    ("recording.py", "_clean_pass"),
    ("replay.py", "entering_at"),
    ("replay.py", "replayed"),
    ("hooks.py", "torch_hook"),
}
"""Where the model is changed and changed back: every second line is tried on each path, and every 100th of all."""


@functools.cache
def made(wrapper: str):
    """A model's own copy and what wraps it; a test that leaves something on it fails, and so may those after it."""
    hf = fresh("llama")
    return hf, {"huggingface": lambda m: m, "transformer_lens": lambda m: bridge("llama", m), "nnsight": traced}[
        wrapper
    ](hf)


def modules(wrapper: str) -> list[torch.nn.Module]:
    """All that hooks could be left on."""
    hf, handle = made(wrapper)
    return [hf, handle] if wrapper == "transformer_lens" else [hf]


def called(wrapper: str, path: str, **how) -> torch.Tensor:
    """From a handle as a user has it to effects; the check of replay included, since `wrap` makes a new model each time."""
    recording = record(wrap(made(wrapper)[1]), PROMPTS, [SITE])
    vectors = edited(recording, SITE, PROMPT, POSITION)
    metrics = ("kl", "kl_direct")
    return torch.stack(
        [
            *measure(
                recording, SITE, PROMPT, POSITION, vectors, **{"metrics": metrics, "path": path, **how}
            ).values.values()
        ]
    )


def _stop(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("path", ["replay", "hooks"])
def test_ctrl_c_in_passes_and_callbacks_restores_the_model(wrapper, path):
    expected, before, seen = called(wrapper, path), left_on(*modules(wrapper)), []
    with at_module(-1, seen):
        called(wrapper, path)
    for share in (0.0, 0.3, 0.6, 0.95):
        with pytest.raises(KeyboardInterrupt), at_module(1 + int(share * (len(seen) - 1))):
            called(wrapper, path)
        assert left_on(*modules(wrapper)) == before
    recording = record(wrap(made(wrapper)[1]), PROMPTS, [SITE])
    at = (recording, SITE, PROMPT, POSITION)
    with pytest.raises(KeyboardInterrupt):
        measure(*at, _stop, path=path)  # vectors from a function
    with pytest.raises(KeyboardInterrupt):
        called(wrapper, path, progress=_stop, batch_rows=1)
    with pytest.raises(KeyboardInterrupt):
        gradients(*at, _stop)
    assert left_on(*modules(wrapper)) == before
    assert torch.equal(called(wrapper, path), expected)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_ctrl_c_in_streams_and_logits_restores_the_model(wrapper):
    called(wrapper, "hooks")  # a bridge's block puts hooks of its own on itself in its first pass, and keeps them
    before = left_on(*modules(wrapper))
    model = wrap(made(wrapper)[1])
    stream = ActivationStream(model, PROMPTS, [SITE], batch_tokens=4, buffer_tokens=8, sink_filter=None)
    with pytest.raises(KeyboardInterrupt), at_module(20):
        next(stream)
    recording = record(model, PROMPTS, [SITE])
    with pytest.raises(KeyboardInterrupt), at_module(20):
        intervened_logits(recording, SITE, PROMPT, POSITION, edited(recording, SITE, PROMPT, POSITION))
    assert left_on(*modules(wrapper)) == before
    other = ActivationStream(model, PROMPTS, [SITE], batch_tokens=4, buffer_tokens=8, sink_filter=None)
    assert torch.equal(next(stream)[SITE], next(other)[SITE])  # the interrupted stream goes on


@pytest.mark.parametrize("path", ["replay", "hooks"])
def test_ctrl_c_at_sampled_lines_restores_the_model(path):
    """Lines that restore the model are not interrupted: see `restoring`."""
    expected, before, seen = called("huggingface", path), left_on(*modules("huggingface")), set()
    with at_line(None, seen):
        called("huggingface", path)
    lines = sorted(seen)
    near = [at for at in lines if at[:2] in LINES]
    assert len(near) > 30
    for at in sorted({*near[path == "hooks" :: 2], *lines[::100]} - restoring()):
        with pytest.raises(KeyboardInterrupt), at_line(at):
            called("huggingface", path)
        assert left_on(*modules("huggingface")) == before, at
    assert torch.equal(called("huggingface", path), expected)
