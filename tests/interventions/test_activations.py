"""Streams against recordings: the same vectors, each token once, the same batches after a resumption.

Tolerance: as for recordings, batches of other shapes sum in another order; where the batches are the same, so are the bits.
"""

import io
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interventions import HookError, MechdiagError, ModelError, Site, SiteError, TextError, activations, record, wrap
from interventions.activations import ActivationStream
from interventions.texts.prompts import Prompts, as_prompts
from tests.tiny import (
    D_MODEL,
    N_LAYERS,
    TOLERANCE,
    VOCAB,
    blocks,
    fresh,
    points,
    prompts,
    tiny_model,
    tokenizer,
    wrapped,
)

PRE = Site(2, "resid_pre")
SITES = [PRE, Site(1, "attn_out"), Site(3, "mlp_out"), Site(2)]
TEXT = prompts((24, 10, 17, 24, 1, 5, 13))
SMALL = {"batch_tokens": 8, "buffer_tokens": 40, "batch_prompts_tokens": 48, "sink_filter": None, "autocast": "none"}


def stream(model="llama", text=TEXT, sites=SITES, device="cpu", **options):
    model = tiny_model(model, device) if isinstance(model, str) else model
    return ActivationStream(model, text, sites, **{**SMALL, **options})


def gathered(of: ActivationStream):
    """All that a stream gives, end to end: activations by site and the index."""
    batches, index = zip(*of, strict=True)
    return {site: torch.cat([batch[site] for batch in batches]) for site in of.sites}, torch.cat(index)


def tokens_of(index) -> Counter:
    return Counter(map(tuple, index.tolist()))


def every_token(text=TEXT) -> Counter:
    return Counter((i, j) for i, ids in enumerate(text) for j in range(len(ids)))


def assert_as_recorded(of: ActivationStream, recording, rtol=1e-5):
    values, index = gathered(of)
    assert len(index) == of.provenance()["tokens"]["emitted"] > 0
    for site in of.sites:
        expected = recording.at(site, *index.T)
        assert torch.allclose(values[site], expected, atol=TOLERANCE, rtol=rtol)
        assert not torch.allclose(values[site], expected.roll(1, 0), atol=0.01)


def hooks(hf) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules())


# What the vectors are


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt_neox", "opt", "mamba"])
def test_streamed_vectors_equal_recorded_ones(name, device):
    here = [Site(layer, point) for layer, point in zip((3, 1, 2, 3, 0), points(name), strict=False)]
    hf = tiny_model(name, device)
    assert_as_recorded(stream(hf, sites=here, with_index=True), record(hf, TEXT, here, keep_cache=False))


@pytest.mark.parametrize(
    ("name", "wrapper"), [pytest.param("llama", "bridge", marks=pytest.mark.bridge), ("gpt2", "nnsight")]
)
def test_wrapped_models_stream_the_same_vectors(name, wrapper, device):
    model = wrap(wrapped(name, wrapper, device))
    record(model, TEXT)  # the first pass is where a bridge sets hooks of its own
    before = hooks(model.hf)
    assert_as_recorded(stream(model, with_index=True), record(tiny_model(name, device), TEXT, SITES))
    assert hooks(model.hf) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_activations_are_float32_at_least(dtype, device):
    """Prompts run one by one on both sides, so the bits are the same."""
    hf = fresh("llama", device, dtype)
    one_by_one = stream(hf, with_index=True, batch_prompts_tokens=1, autocast="bfloat16")
    assert one_by_one.provenance()["autocast"] == "none"
    values, index = gathered(one_by_one)
    recording = record(hf, TEXT, SITES, batch_prompts=1)
    for site in SITES:
        assert values[site].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(values[site], recording.at(site, *index.T).to(values[site].dtype))


def test_batches_are_independent_plain_tensors(device):
    hf = fresh("llama", device).requires_grad_(True)
    expected = list(stream(hf))
    for batch, untouched in zip(stream(hf), expected, strict=True):
        assert list(batch) == SITES
        for site in SITES:
            values = batch[site]
            assert values.shape == (8, D_MODEL) and values.device == hf.device
            assert not values.requires_grad and values.grad_fn is None and not values.is_inference()
            assert torch.equal(values, untouched[site])
            values.zero_()
    weight = torch.ones(D_MODEL, device=device, requires_grad=True)
    (expected[0][SITES[0]] @ weight).sum().backward()
    assert weight.grad is not None and all(p.grad is None for p in hf.parameters())


# What runs


@pytest.mark.parametrize(
    ("name", "wrapper", "deepest", "mlp_runs"),
    [
        ("llama", "plain", Site(2, "attn_out"), False),
        ("gpt2", "plain", Site(2), True),
        pytest.param("llama", "bridge", Site(2, "attn_out"), False, marks=pytest.mark.bridge),
        ("gpt2", "nnsight", Site(2), True),
    ],
)
def test_nothing_above_the_deepest_site_runs(name, wrapper, deepest, mlp_runs, device):
    model = wrap(wrapped(name, wrapper, device))
    s = stream(model, sites=[Site(0), deepest, Site(1, "mlp_out")], with_index=True)
    calls = Counter()
    watched = {**dict(enumerate(model.blocks)), "mlp": model.blocks[2].mlp, "head": model.hf.get_output_embeddings()}
    watched["norm"] = model.base.norm if name == "llama" else model.base.ln_f
    removed = [m.register_forward_pre_hook(lambda *_, key=key: calls.update([key])) for key, m in watched.items()]
    _, index = gathered(s)
    for handle in removed:
        handle.remove()
    passes = calls[0]
    assert passes >= 3 and calls == Counter({0: passes, 1: passes, 2: passes, **({"mlp": passes} if mlp_runs else {})})
    assert len(index) == 88


def test_prompts_of_similar_length_run_together(device, monkeypatch):
    """7 prompts of 94 tokens, one buffer: [24, 24], [17, 13], [10, 5, 1] under 48 tokens a pass."""
    hf = fresh("llama", device)
    s, shapes = stream(hf, buffer_tokens=94), []
    real = activations.run_to_sites

    def seen(model, ids, *rest):
        shapes.append(ids.shape)
        real(model, ids, *rest)

    monkeypatch.setattr(activations, "run_to_sites", seen)
    next(s)
    assert shapes == [(2, 24), (2, 17), (3, 10)]
    hf.model.layers[1].register_forward_hook(lambda *_: None)  # code of a user's own may tell prompts of a pass apart
    shapes.clear()
    next(stream(hf, buffer_tokens=94))
    assert {n for n, _ in shapes} == {1} and len(shapes) == 7


@pytest.mark.parametrize("after", [0, 4])
def test_stream_continues_after_an_exception(after, device):
    hf = fresh("llama", device)
    expected = list(stream(hf))
    s = stream(hf)
    found = [next(s) for _ in range(after)]
    forward = hf.model.layers[1].forward

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    hf.model.layers[1].forward = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        while True:
            found.append(next(s))
    assert hooks(hf) == 0 and torch.is_grad_enabled()
    hf.model.layers[1].forward = forward
    found += list(s)
    assert len(found) == len(expected)
    assert all(torch.equal(a[site], b[site]) for a, b in zip(found, expected, strict=True) for site in SITES)
    assert s.provenance()["tokens"]["emitted"] == 8 * len(expected)


def test_a_site_that_does_not_run_raises(device):
    hf = fresh("llama", device)
    s = stream(hf)
    hf.model.layers[2].forward = lambda hidden_states, **_: hidden_states
    blocks("llama", hf)[3].forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(HookError, match=r"nothing was seen at 3.mlp_out"):
        next(s)
    assert hooks(hf) == 0


# Which tokens, in which order


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=9),
    batch=st.integers(1, 12),
    extra=st.integers(0, 50),
    most=st.integers(1, 100),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 3),
    skip=st.integers(0, 2),
)
def test_each_epoch_has_each_token_once_at_every_site(lengths, batch, extra, most, epochs, seed, skip):
    text = prompts(tuple(lengths))
    options = {"batch_tokens": batch, "buffer_tokens": batch + extra, "batch_prompts_tokens": most}
    kept = Counter({key: epochs for key in every_token(text) if key[1] >= skip})
    if kept.total() < batch:
        with pytest.raises(TextError, match="less than one batch"):
            stream(text=text, epochs=epochs, skip_first=skip, **options)
        return
    here = [Site(0, "resid_pre"), Site(1)]
    s = stream(text=text, sites=here, epochs=epochs, seed=seed, skip_first=skip, with_index=True, **options)
    values, index = gathered(s)
    found, tokens = tokens_of(index), s.provenance()["tokens"]
    left = kept - found
    assert len(index) == batch * s.max_batches and found <= kept and left.total() == kept.total() % batch
    assert tokens["kept"] == kept.total() and tokens["waiting"] == 0
    assert tokens["dropped"]["last_short_batch"] == left.total()
    assert tokens["seen"] == epochs * sum(lengths) == tokens["kept"] + tokens["dropped"]["skip_first"]
    recording = record(tiny_model("llama"), text, here, keep_cache=False)
    for site in here:
        assert torch.allclose(values[site], recording.at(site, *index.T), atol=TOLERANCE, rtol=1e-5)


@settings(max_examples=20)
@given(
    at=st.integers(0, 40),
    batch=st.integers(1, 12),
    extra=st.integers(0, 60),
    epochs=st.integers(1, 2),
    sink_filter=st.sampled_from([None, 1.2]),
    seed=st.integers(0, 3),
)
def test_resumed_stream_is_bitwise_equal(at, batch, extra, epochs, sink_filter, seed):
    options = {"batch_tokens": batch, "buffer_tokens": batch + extra, "epochs": epochs, "seed": seed}
    made = {**options, "sites": SITES[:2], "sink_filter": sink_filter, "with_index": True}
    whole = stream(**made)
    for _ in range(at):
        next(whole, None)
    kept = io.BytesIO()
    torch.save(whole.state_dict(), kept)
    kept.seek(0)
    resumed = stream(**made)
    resumed.load_state_dict(torch.load(kept, weights_only=True))
    assert resumed.provenance() == whole.provenance()
    for (batch_a, index_a), (batch_b, index_b) in zip(whole, resumed, strict=True):
        assert torch.equal(index_a, index_b)
        assert all(torch.equal(batch_a[site], batch_b[site]) for site in SITES[:2])
    assert resumed.provenance() == whole.provenance()


def test_more_epochs_continue_a_finished_stream(device):
    short, long = stream(device=device), stream(device=device, epochs=2)
    expected, found = list(long), list(short)
    more = stream(device=device, epochs=2)
    more.load_state_dict(short.state_dict())
    found += list(more)
    assert len(found) == len(expected) == 2 * 94 // 8
    assert all(torch.equal(a[site], b[site]) for a, b in zip(found, expected, strict=True) for site in SITES)


def test_order_depends_on_seed_and_epoch_not_on_sites(device):
    hf = fresh("llama", device)
    hf.model.embed_tokens.weight[5] *= 1e4
    text = [[5, *(t if t != 5 else 6 for t in ids)] for ids in TEXT]

    def order(**options):
        return gathered(stream(hf, text, with_index=True, buffer_tokens=101, **options))[1].tolist()

    whole = order(batch_tokens=1)
    assert order(batch_tokens=1, sites=[Site(4)]) == whole
    assert order(batch_tokens=1, sink_filter=100.0) == [row for row in whole if row[1] > 0]
    assert order(batch_tokens=1, seed=1) != whole
    twice = order(batch_tokens=1, epochs=2)
    assert twice[:101] == whole and sorted(twice[101:]) == sorted(whole) != twice[101:] != whole


def test_a_buffer_mixes_its_prompts(device):
    """A buffer of all 7 prompts mixes them in its first batch; a buffer of one batch holds only the first few."""
    _, index = next(stream(device=device, buffer_tokens=94, batch_tokens=16, with_index=True))
    assert len(index[:, 0].unique()) >= 4 and index[:, 1].tolist() != sorted(index[:, 1].tolist())
    _, index = next(stream(device=device, buffer_tokens=16, batch_tokens=16, with_index=True))
    assert len(index[:, 0].unique()) <= 3


def test_carried_tokens_count_towards_the_buffer(device):
    """Prompts of 4 tokens, 12 a buffer, 8 a batch: 4 tokens are carried, 8 new ones fill the next buffer."""
    s = stream(text=prompts((4,) * 7), buffer_tokens=12, device=device)
    assert [s.provenance()["tokens"]["seen"] for _ in s] == [12, 20, 28]


# What is left out


def test_special_and_first_tokens_are_left_out(device):
    given_ = as_prompts([[2, *ids, 2] for ids in TEXT], tokenizer())
    s = stream(text=given_, batch_tokens=1, skip_first=2, with_index=True, device=device)
    _, index = gathered(s)
    expected = {(i, j) for i, marks in enumerate(given_.special) for j, mark in enumerate(marks) if not mark and j >= 2}
    assert tokens_of(index) == Counter(expected)
    dropped = s.provenance()["tokens"]["dropped"]
    assert dropped["special"] == sum(map(sum, given_.special)) >= 14
    assert dropped["skip_first"] == sum(not mark for marks in given_.special for mark in marks[:2])


def planted(device, value):
    """A model that multiplies token 5's embedding by `value`, and a text in which only some prompts have it, last."""
    hf = fresh("llama", device)
    hf.model.embed_tokens.weight[5] *= value
    text = [[t if t != 5 else 6 for t in ids] + [5] * (i % 2) for i, ids in enumerate(TEXT)]
    return hf, text


def test_a_planted_sink_is_dropped_at_all_sites(device):
    """Its norm is large only in the residual stream; attention and MLP read it normalised."""
    hf, text = planted(device, 1e4)
    here = [Site(0, "mlp_out"), Site(1), Site(0, "attn_out")]
    s = stream(hf, text, here, batch_tokens=1, sink_filter=50.0, with_index=True)
    assert_as_recorded(s, record(hf, text, here))
    found = s.provenance()
    assert found["tokens"]["dropped"] == {
        "special": 0,
        "skip_first": 0,
        "not_finite": 0,
        "sink": 3,
        "last_short_batch": 0,
    }
    assert {site: counts["sink"] for site, counts in found["by_site"].items()} == {
        "0.mlp_out": 0,
        "1.resid_post": 3,
        "0.attn_out": 0,
    }
    _, index = gathered(stream(hf, text, here, batch_tokens=1, sink_filter=50.0, with_index=True))
    sinks = {(i, len(ids) - 1) for i, ids in enumerate(text) if ids[-1] == 5}
    assert tokens_of(index) == every_token(text) - Counter(sinks)
    for none in (None, 0.0):
        assert len(list(stream(hf, text, here, batch_tokens=1, sink_filter=none))) == sum(map(len, text))


def test_sink_filter_uses_the_medians_of_the_first_buffer(device):
    """Batches of one token carry nothing over, so the first buffer's tokens come out first."""
    hf, options = tiny_model("llama", device), {"batch_tokens": 1, "buffer_tokens": 30}
    whole = stream(hf, with_index=True, **options)
    _, index = next(whole)
    n_first = whole.provenance()["tokens"]["seen"]
    index = torch.cat([index, gathered(whole)[1]])
    assert 30 <= n_first < len(index) == 94
    s = stream(hf, sink_filter=1.1, **options)
    list(s)
    found, recording = s.provenance()["by_site"], record(hf, TEXT, SITES)
    for site in SITES:
        norm = recording.at(site, *index.T).norm(dim=-1)
        median = norm[:n_first].median()
        assert found[str(site)]["median_norm"] == pytest.approx(float(median), rel=1e-5)
        assert 0 < found[str(site)]["sink"] == int((norm > 1.1 * median).sum())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tokens_that_are_not_finite_are_dropped_at_all_sites(value, device):
    """Three tokens are nonfinite before block 0; after it, so are all tokens that attended to them."""
    hf, text = planted(device, value)
    here = [Site(0, "resid_pre"), Site(0)]
    recording = record(hf, text, here)
    kept = {
        (i, j)
        for i, ids in enumerate(text)
        for j in range(len(ids))
        if all(recording.activations[site][i, j].isfinite().all() for site in here)
    }
    s = stream(hf, text, here, batch_tokens=1, sink_filter=1e6, with_index=True)
    values, index = gathered(s)
    assert tokens_of(index) == Counter(kept)
    assert all(x.isfinite().all() for x in values.values())
    found, dropped = s.provenance(), sum(map(len, text)) - len(kept)
    assert found["tokens"]["dropped"]["not_finite"] == dropped > 0 == found["tokens"]["dropped"]["sink"]
    assert found["by_site"]["0.resid_pre"]["not_finite"] == 3 <= found["by_site"]["0.resid_post"]["not_finite"]
    assert found["by_site"]["0.resid_post"]["not_finite"] == dropped


def test_provenance_counts_tokens_and_is_plain_data(device):
    given_ = Prompts(TEXT, [[False] * len(ids) for ids in TEXT], [""] * 7, provenance={"name": "some text"})
    s = stream(text=given_, device=device, seed=3)
    assert s.provenance()["tokens"]["seen"] == s.provenance()["batches"] == 0
    assert s.provenance()["by_site"]["2.resid_pre"]["median_norm"] is None
    next(s)
    found = s.provenance()
    tokens = found["tokens"]
    assert tokens["seen"] == tokens["kept"] == tokens["emitted"] + tokens["waiting"] >= 40 and tokens["emitted"] == 8
    assert (found["buffers"], found["epochs_done"], found["batches"]) == (1, 0, 1)
    list(s)
    found = s.provenance()
    assert found["tokens"]["waiting"] == 0 and found["tokens"]["dropped"]["last_short_batch"] == 94 % 8
    assert found["text"] == {"name": "some text"} and found["seed"] == 3 and found["autocast"] == "none"
    assert found["buffer_tokens"] == 40 and found["epochs_done"] == found["epochs"] == 1
    assert list(found["by_site"]) == found["sites"] == [str(site) for site in SITES]
    buffer = io.BytesIO()
    torch.save(found, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == found


# Autocast


def test_autocast_rounds_and_is_in_provenance(device):
    exact, index = gathered(stream(device=device, autocast="none", with_index=True))
    s = stream(device=device, autocast="bfloat16", with_index=True)
    rounded, same = gathered(s)
    assert torch.equal(index, same) and s.provenance()["autocast"] == "bfloat16"
    for site in SITES:
        assert rounded[site].dtype == torch.float32
        error = (rounded[site] - exact[site]).norm() / exact[site].norm()
        assert 2**-12 < error < 2**-4  # a few dozen roundings of 2⁻⁹ each
    assert not torch.is_autocast_enabled(torch.device(device).type)


def test_the_callers_autocast_is_ignored(device):
    expected = next(stream(device=device, autocast="none"))
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        found = next(stream(device=device, autocast="none"))
    assert all(torch.equal(found[site], expected[site]) for site in SITES)


@pytest.mark.parametrize("has", [True, False])
def test_auto_autocast_uses_bfloat16_where_supported(has, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has}, raising=False)
    assert stream(autocast="auto").autocast == ("bfloat16" if has else "none")
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has, raising=False)
    assert stream(autocast="auto").autocast == ("bfloat16" if has else "none")
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert stream(autocast="auto").autocast == "none"
    assert stream(fresh("llama", dtype=torch.bfloat16)).autocast == "none"
    assert not activations._multiplies_bfloat16(torch.device("mps"))


# Errors


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (MechdiagError, "buffer_tokens 7 is below batch_tokens 8", {"buffer_tokens": 7}),
        (MechdiagError, "batch_tokens 0; expected 1 or more", {"batch_tokens": 0}),
        (MechdiagError, "batch_prompts_tokens 0", {"batch_prompts_tokens": 0}),
        (MechdiagError, "epochs 0", {"epochs": 0}),
        (MechdiagError, "skip_first -1", {"skip_first": -1}),
        (MechdiagError, "sink_filter -1", {"sink_filter": -1.0}),
        (MechdiagError, "sink_filter nan", {"sink_filter": float("nan")}),
        (MechdiagError, "unknown autocast 'fp8'; known: auto, bfloat16, none", {"autocast": "fp8"}),
        (ModelError, "cannot use a", {"model": torch.nn.Linear(2, 2)}),
        (SiteError, "no sites", {"sites": []}),
        (SiteError, "no block 6 in a model of 6 blocks", {"sites": [Site(N_LAYERS)]}),
        (SiteError, "no resid_mid in block 1", {"model": "gpt_neox", "sites": [Site(1, "resid_mid")]}),
        (TextError, "prompts are list of length 0", {"text": []}),
        (TextError, "0 prompts", {"text": Prompts([], [], [])}),
        (TextError, "one mark|as many marks", {"text": Prompts([[1, 2]], [[False]], [""])}),
        (TextError, f"token id {VOCAB} is outside the vocabulary of {VOCAB}", {"text": [[1, VOCAB, 3]]}),
        (TextError, "token id -1", {"text": [[1, -1, 3]]}),
        (TextError, r"^7 tokens in 2 prompts \(0 special and 0 skipped .*one batch of 8", {"text": [[1] * 4, [2] * 3]}),
        (TextError, "^6 tokens in 2 prompts .* 2 skipped", {"text": [[1] * 4, [2] * 4], "skip_first": 1}),
    ],
)
def test_invalid_arguments_raise(error, message, options):
    with pytest.raises(error, match=message):
        stream(**options)


def test_filters_that_leave_less_than_a_batch_raise(device):
    hf, _ = planted(device, 1e4)
    s = stream(hf, [[5, 1, 2, 3], [4, 6, 7, 5]], [Site(0, "resid_pre")], sink_filter=100.0)
    for _ in range(2):
        with pytest.raises(TextError, match=r"6 of 8 tokens kept, less than one batch of 8; dropped: .*'sink': 2"):
            next(s)


def test_a_model_with_no_finite_activation_raises(device):
    hf = fresh("llama", device)
    hf.model.embed_tokens.weight[:] = float("nan")
    with pytest.raises(MechdiagError, match=r"of the first .* tokens none is finite at all of 2.resid_pre, "):
        next(stream(hf, sites=[PRE, Site(2)]))


def test_the_state_of_another_stream_raises(device):
    state = stream(device=device).state_dict()
    for options, message in (
        ({"seed": 1}, "seed 0, here 1"),
        ({"text": TEXT[::-1]}, "tokens_sha256"),
        ({"skip_first": 1}, "skip_first 0, here 1"),
        ({"model": "gpt2"}, "weights_sha256"),
        ({"sites": SITES[:1]}, "sites"),
        ({"buffer_tokens": 50, "batch_tokens": 9}, "batch_tokens 8, here 9; buffer_tokens 40, here 50"),
    ):
        with pytest.raises(MechdiagError, match=f"of another stream: .*{message}"):
            stream(device=device, **options).load_state_dict(state)
