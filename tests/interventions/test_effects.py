"""`measure`: what must not matter does not, what is compared is what was asked for, and what goes wrong is said.

Which rows share a chunk changes the order of sums: float32 logits within 1e-5 of each other, and KL within
`tiny.assert_same_effect` of that.
"""

import warnings

import jaxtyping
import numpy as np
import pytest
import torch

from interventions import (
    EditError,
    MechdiagError,
    ModelError,
    Reference,
    Site,
    SiteError,
    intervened_logits,
    measure,
    record,
    trust,
    wrap,
)
from interventions import edits as edit
from interventions import effects as module
from interventions.metrics import METRICS, kl_divergence
from interventions.trust import logit_tolerance
from tests.tiny import (
    D_MODEL,
    N_LAYERS,
    TOLERANCE,
    all_alone,
    assert_same_effect,
    edited,
    exact_kl,
    fresh,
    noise,
    prompts,
    rows,
    tiny_model,
)

SITE = Site(2)
PATHS = pytest.mark.parametrize("path", ["replay", "hooks"])
SHUFFLED_CHUNKS = 1e-5


def setting(device, name="llama", site=SITE, pairs=None):
    recording = record(tiny_model(name, device), prompts(), [site])
    prompt, position = rows() if pairs is None else rows(pairs)
    return recording, prompt, position, edited(recording, site, prompt, position)


def same(found, expected):
    assert_same_effect(found, expected, SHUFFLED_CHUNKS)


@pytest.fixture
def unchecked_shapes():
    """As a user runs it: no shapes are checked at the door but by the engine itself."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


# What must not matter


@PATHS
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_rows(path, seed, device):
    recording, prompt, position, vectors = setting(device)
    expected = measure(recording, SITE, prompt, position, vectors, metrics=tuple(METRICS), path=path)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(prompt)))
    found = measure(
        recording, SITE, prompt[order], position[order], vectors[order.to(device)], metrics=tuple(METRICS), path=path
    )
    same(found["kl"], expected["kl"][order])
    same(found["js"], expected["js"][order])
    assert torch.equal(found["top1_changed"], expected["top1_changed"][order])
    assert torch.allclose(found["clean_entropy"], expected["clean_entropy"][order], atol=1e-5)


@PATHS
@pytest.mark.parametrize("batch_rows", [1, 7, 512])
def test_the_size_of_chunks(path, batch_rows, device):
    recording, prompt, position, vectors = setting(device)
    order = torch.randperm(len(prompt), generator=torch.Generator().manual_seed(0))
    prompt, position, vectors = prompt[order], position[order], vectors[order.to(device)]
    logits = all_alone("llama", recording.model.hf, prompts(), SITE, prompt, position, vectors)
    clean = all_alone("llama", recording.model.hf, prompts(), SITE, prompt, position, None)
    seen = []
    effects = measure(
        recording, SITE, prompt, position, vectors, path=path, batch_rows=batch_rows, progress=seen.append
    )
    assert_same_effect(effects["kl"], exact_kl(clean, logits), TOLERANCE)
    assert sum(seen) == len(prompt) and max(seen) <= batch_rows and len(seen) == -(-len(prompt) // batch_rows)


def test_more_rows_and_tokens_than_fit_at_once(device):
    """A vocabulary so large that a chunk's logits are formed in several parts, and edits of one token straddle them."""
    vocab = 49152
    hf = tiny_model("llama", device, vocab=vocab)
    tokens = prompts(vocab=vocab)
    recording = record(hf, tokens, [SITE])
    prompt, position = rows([(0, 12)] * 300 + [(0, p) for p in range(24)] * 20 + [(1, 9)] * 11)
    order = torch.randperm(len(prompt), generator=torch.Generator().manual_seed(0))
    prompt, position = prompt[order], position[order]
    vectors = edited(recording, SITE, prompt, position)
    effects = measure(
        recording, SITE, prompt, position, vectors, metrics=("kl", "top1_changed", "clean_entropy"), batch_rows=2000
    )
    for start in range(0, len(prompt), 100):
        part = slice(start, start + 100)
        clean = recording.model.hf.lm_head(recording.final_hidden[prompt[part].to(device), position[part].to(device)])
        logits = intervened_logits(recording, SITE, prompt[part], position[part], vectors[part])
        assert_same_effect(effects["kl"][part], exact_kl(clean, logits), SHUFFLED_CHUNKS, rounding=1e-4)
        changed = (logits.argmax(-1) != clean.argmax(-1)).cpu()
        assert (effects["top1_changed"][part] != changed).sum() <= 1  # a tie may fall either way
        log_p = clean.double().log_softmax(-1).cpu()
        assert torch.allclose(effects["clean_entropy"][part].double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-4)


@PATHS
def test_the_same_call_twice_is_the_same_to_the_bit(path, device):
    recording, prompt, position, vectors = setting(device)
    first, second = (
        measure(recording, SITE, prompt, position, vectors, metrics=tuple(METRICS), path=path) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in METRICS)
    assert path == "hooks" or first.delta == second.delta


@PATHS
@pytest.mark.parametrize("batch_rows", [3, None])
def test_a_function_of_rows_gives_what_the_tensor_gives(path, batch_rows, device):
    recording, prompt, position, vectors = setting(device)
    asked = []

    def formed(index):
        assert index.device.type == "cpu"
        asked.extend(index.tolist())
        return vectors[index.to(device)]

    expected = measure(recording, SITE, prompt, position, vectors, path=path, batch_rows=batch_rows)
    found = measure(recording, SITE, prompt, position, formed, path=path, batch_rows=batch_rows)
    assert torch.equal(found["kl"], expected["kl"])
    assert set(asked) == set(range(len(prompt)))


def test_vectors_of_another_dtype_and_device(device):
    recording, prompt, position, vectors = setting(device)
    expected = measure(recording, SITE, prompt, position, vectors)["kl"]
    found = measure(recording, SITE, prompt, position, vectors.double().cpu())["kl"]
    assert torch.equal(found, expected)


def test_gradients_are_not_kept(device):
    hf = fresh("llama", device).requires_grad_(True)
    recording = record(hf, prompts(), [SITE])
    prompt, position = rows()
    vectors = edited(recording, SITE, prompt, position).requires_grad_(True)
    for path in ("replay", "hooks"):
        effects = measure(recording, SITE, prompt, position, vectors, path=path)
        logits = intervened_logits(recording, SITE, prompt, position, vectors, path=path)
        assert not effects["kl"].requires_grad and not logits.requires_grad
        assert not effects["kl"].is_inference() and not logits.is_inference()
    assert all(p.grad is None for p in hf.parameters())


# What is compared


@PATHS
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_swapped_norm_and_direction_are_a_full_patch(name, path, device):
    """swap_norm(swap_direction(x, a), a) = a: vectors equal to a few eps, so effects as `same` allows."""
    recording, prompt, position, _ = setting(device, name)
    x = recording.at(SITE, prompt, position)
    a = x.roll(5, dims=0)
    both = edit.swap_norm(edit.swap_direction(x, a), a)
    found = measure(recording, SITE, prompt, position, both, path=path)["kl"]
    expected = measure(recording, SITE, prompt, position, edit.replace(x, a), path=path)["kl"]
    assert expected.max() > 0.1
    assert_same_effect(found, expected, TOLERANCE)


@PATHS
@pytest.mark.parametrize("site", [Site(0, "resid_pre"), SITE, Site(N_LAYERS - 1)], ids=str)
def test_a_reference_is_another_run(path, site, device):
    """KL between two hooked runs, formed by hand; two references at each token, one of them shared by several rows."""
    recording, prompt, position, vectors = setting(device, site=site)
    index = torch.arange(len(prompt)) // 2  # neighbours of one token or of two
    other = recording.at(site, prompt[::2], position[::2])
    other = other + 0.5 * other.norm(dim=-1, keepdim=True) / D_MODEL**0.5 * noise(len(other), device, seed=9)
    effects = measure(
        recording, site, prompt, position, vectors, reference=Reference(other, index), path=path, metrics=("kl", "js")
    )
    hf = recording.model.hf
    clean = all_alone("llama", hf, prompts(), site, prompt, position, other[index.to(device)])
    slow = all_alone("llama", hf, prompts(), site, prompt, position, vectors)
    assert_same_effect(effects["kl"], exact_kl(clean, slow), TOLERANCE)
    assert torch.allclose(effects["kl"].to(device), kl_divergence(clean, slow), atol=1e-4)
    plain = measure(recording, site, prompt, position, vectors, path=path)["kl"]
    assert (effects["kl"] - plain).abs().max() > 0.01


@PATHS
def test_one_reference_for_rows_of_many_places(path, device):
    """The same vector is another clean side at another token."""
    recording, prompt, position, vectors = setting(device)
    other = 2 * noise(1, device, seed=9)
    index = torch.zeros(len(prompt), dtype=torch.long)
    found = measure(recording, SITE, prompt, position, vectors, reference=Reference(other, index), path=path)["kl"]
    hf = recording.model.hf
    clean = all_alone("llama", hf, prompts(), SITE, prompt, position, other.expand(len(prompt), -1))
    slow = all_alone("llama", hf, prompts(), SITE, prompt, position, vectors)
    assert_same_effect(found, exact_kl(clean, slow), TOLERANCE)


@PATHS
def test_a_reference_in_a_prompt_of_one_token(path, device):
    recording = record(tiny_model("llama", device), [[0]], [SITE])
    zero = torch.zeros(4, dtype=torch.long)
    vectors, other = noise(4, device, seed=3), noise(2, device, seed=4)
    index = torch.tensor([1, 0, 1, 0])
    found = measure(recording, SITE, zero, zero, vectors, reference=Reference(other, index), path=path)["kl"]
    hf = recording.model.hf
    clean = all_alone("llama", hf, [[0]], SITE, zero, zero, other[index.to(device)])
    slow = all_alone("llama", hf, [[0]], SITE, zero, zero, vectors)
    assert_same_effect(found, exact_kl(clean, slow), TOLERANCE)


@PATHS
def test_a_row_compared_with_itself(path, device):
    recording, prompt, position, vectors = setting(device)
    index = torch.arange(len(prompt))
    found = measure(recording, SITE, prompt, position, vectors, reference=Reference(vectors, index), path=path)
    assert found["kl"].max() <= 1e-9


# Memory


@pytest.mark.parametrize("limit", [1, 5, 9])
def test_a_chunk_that_runs_out_of_memory_is_halved(limit, monkeypatch, device):
    recording, prompt, position, vectors = setting(device)
    expected = measure(recording, SITE, prompt, position, vectors)["kl"]  # checked once: no trial below
    real, asked = module.final_hidden, []

    def scarce(recording, first_block, prompt, *rest, **options):
        asked.append(len(prompt))
        if len(prompt) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(recording, first_block, prompt, *rest, **options)

    monkeypatch.setattr(module, "final_hidden", scarce)
    seen = []
    with pytest.warns(UserWarning, match="out of memory: chunks halved"):
        effects = measure(recording, SITE, prompt, position, vectors, batch_rows=16, progress=seen.append)
    assert effects.halvings == {1: 4, 5: 2, 9: 1}[limit] and max(asked) == 16
    assert sum(seen) == len(prompt) and max(seen) <= limit
    same(effects["kl"], expected)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("boom: shapes do not match"), RuntimeError),
        (torch.OutOfMemoryError("CUDA out of memory."), torch.OutOfMemoryError),
        (MemoryError(), MemoryError),
        (KeyError("not there"), KeyError),
    ],
    ids=["another error", "no memory for one row", "no host memory for one row", "key"],
)
def test_errors_that_are_not_swallowed(error, kind, monkeypatch, device):
    recording, prompt, position, vectors = setting(device)
    measure(recording, SITE, prompt, position, vectors)
    calls = []

    def fail(*_, **__):
        calls.append(1)
        raise error

    monkeypatch.setattr(module, "final_hidden", fail)
    with pytest.raises(kind):
        measure(recording, SITE, prompt, position, vectors, batch_rows=8)
    assert len(calls) == (4 if kind in (torch.OutOfMemoryError, MemoryError) else 1)


# What goes wrong


@pytest.mark.parametrize("path", ["grouped", "masked", "hooks"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("metrics", [("kl",), ("js",), ("kl", "js", "top1_changed")], ids=str)
def test_vectors_that_are_not_finite_are_counted(metrics, value, path, device):
    """And only these: no other row is touched by them, whatever shares a group or a chunk with them."""
    model = wrap(fresh("llama", device))
    if path == "masked":
        model.replay_attention = path
    recording = record(model, prompts(), [SITE])
    prompt, position = rows()
    vectors = edited(recording, SITE, prompt, position)
    path = "hooks" if path == "hooks" else "replay"
    expected = measure(recording, SITE, prompt, position, vectors, metrics=metrics, path=path)
    bad = torch.tensor([3, 8])
    vectors[bad.to(device)] = value
    effects = measure(recording, SITE, prompt, position, vectors, metrics=metrics, path=path)
    good = torch.ones(len(prompt), dtype=torch.bool).index_fill(0, bad, False)
    assert effects.n_nonfinite == 2
    for name in metrics:
        if name != "top1_changed":
            assert not effects[name][bad].isfinite().any()
            same(effects[name][good], expected[name][good])


def test_zero_vectors_are_ordinary(device):
    recording, prompt, position, vectors = setting(device)
    effects = measure(recording, SITE, prompt, position, torch.zeros_like(vectors))
    assert effects.n_nonfinite == 0 and effects["kl"].min() > 0


def test_delta_is_nan_where_nothing_was_compared(device):
    recording, prompt, position, vectors = setting(device)
    assert np.isnan(measure(recording, SITE, prompt, position, vectors, path="hooks").delta)
    assert 0 < measure(recording, SITE, prompt, position, vectors).delta <= TOLERANCE


def test_metrics_that_are_not_known(device):
    recording, prompt, position, vectors = setting(device)
    with pytest.raises(MechdiagError, match="unknown metric 'kll'; known: kl, js, top1_changed, clean_entropy"):
        measure(recording, SITE, prompt, position, vectors, metrics=("kl", "kll"))


def test_only_what_was_asked_for_is_given(device):
    recording, prompt, position, vectors = setting(device)
    effects = measure(recording, SITE, prompt, position, vectors, metrics=("js", "top1_changed"))
    assert list(effects.values) == ["js", "top1_changed"]
    assert effects["js"].dtype == torch.float32 and effects["top1_changed"].dtype == torch.bool
    assert effects["js"].device.type == "cpu" and effects["js"].shape == prompt.shape


@PATHS
@pytest.mark.parametrize("shape", [(19, D_MODEL + 1), (19, 1), (18, D_MODEL), (20, D_MODEL), (19 * D_MODEL,)], ids=str)
def test_vectors_of_the_wrong_shape(shape, path, unchecked_shapes, device):
    recording, prompt, position, _ = setting(device)
    assert len(prompt) == 19
    with pytest.raises(EditError, match=r"expected \(19, 32\)|vectors"):
        measure(recording, SITE, prompt, position, torch.zeros(shape, device=device), path=path)


def test_a_function_that_gives_the_wrong_shape(unchecked_shapes, device):
    recording, prompt, position, _ = setting(device)
    with pytest.raises(EditError, match="edited vectors of shape"):
        measure(recording, SITE, prompt, position, lambda index: torch.zeros(len(index) + 1, D_MODEL, device=device))


def test_prompts_and_positions_of_other_lengths(unchecked_shapes, device):
    recording, prompt, position, vectors = setting(device)
    with pytest.raises(MechdiagError):
        measure(recording, SITE, prompt, position[:-1], vectors)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(0, 24)], "position 24 lies outside prompt 0, which has 24 tokens"),
        ([(1, 10)], "position 10 lies outside prompt 1, which has 10 tokens"),
        ([(0, -1)], "position -1"),
        ([(5, 0)], "prompt 5 does not exist"),
        ([(-1, 0)], "prompt"),
    ],
    ids=str,
)
def test_rows_outside_their_prompts(pairs, message, device):
    recording = record(tiny_model("llama", device), prompts(), [SITE])
    prompt, position = rows(pairs)
    for function in (measure, intervened_logits):
        with pytest.raises(SiteError, match=message):
            function(recording, SITE, prompt, position, torch.zeros(len(prompt), D_MODEL, device=device))


def test_no_rows(device):
    recording = record(tiny_model("llama", device), prompts(), [SITE])
    none = torch.zeros(0, dtype=torch.long)
    with pytest.raises(SiteError, match="no rows"):
        measure(recording, SITE, none, none, torch.zeros(0, D_MODEL, device=device))


def test_a_layer_that_is_not_there(device):
    recording, prompt, position, vectors = setting(device)
    for function in (measure, intervened_logits):
        with pytest.raises(SiteError, match="no block 6 in a model of 6 blocks"):
            function(recording, Site(N_LAYERS), prompt, position, vectors)


def test_a_site_need_not_be_recorded_to_be_edited(device):
    recording, prompt, position, vectors = setting(device)
    elsewhere = Site(4, "resid_pre")
    assert elsewhere not in recording.activations
    effects = measure(recording, elsewhere, prompt, position, vectors)
    assert effects.path == "replay" and effects["kl"].isfinite().all()


@pytest.mark.parametrize("name", ["replay ", "fast", ""])
def test_paths_that_are_not_known(name, device):
    recording, prompt, position, vectors = setting(device)
    with pytest.raises(MechdiagError, match="path"):
        measure(recording, SITE, prompt, position, vectors, path=name)


@pytest.mark.parametrize("batch_rows", [-1, 0])
def test_chunks_of_no_rows(batch_rows, device):
    """Refused, or taken for the default; never an endless loop."""
    recording, prompt, position, vectors = setting(device)
    expected = measure(recording, SITE, prompt, position, vectors)["kl"]
    try:
        same(measure(recording, SITE, prompt, position, vectors, batch_rows=batch_rows)["kl"], expected)
    except MechdiagError as error:
        assert "batch_rows" in str(error)


def test_replay_is_refused_when_it_is_off_by_more_than_rounding(monkeypatch, device):
    """A path that is nearly right is no path: hidden states off by 1e-3 of their size."""
    recording, prompt, position, vectors = setting(device)
    recording = record(wrap(fresh("llama", device)), prompts(), [SITE])
    real = module.final_hidden

    def nearly(*args, **options):
        hidden = real(*args, **options)
        return hidden + 1e-3 * hidden.roll(1, -1)

    for place in (module, trust):
        monkeypatch.setattr(place, "final_hidden", nearly)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        effects = measure(recording, SITE, prompt, position, vectors)
    assert len(caught) == 1 and effects.path == "hooks" and "logits differ by" in effects.why_hooks
    hf = recording.model.hf
    clean, slow = (all_alone("llama", hf, prompts(), SITE, prompt, position, v) for v in (None, vectors))
    assert_same_effect(effects["kl"], exact_kl(clean, slow), TOLERANCE)


def test_tolerance_grows_with_logits_and_with_eps():
    assert logit_tolerance(torch.float32, 10.0) == pytest.approx(10 * logit_tolerance(torch.float32, 1.0))
    assert logit_tolerance(torch.float32, 0.0) == logit_tolerance(torch.float32, 1.0) <= 1e-4
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    assert sorted(logit_tolerance(k, 1.0) for k in kinds) == [logit_tolerance(k, 1.0) for k in kinds]


def test_errors_are_all_of_one_family():
    assert issubclass(ModelError, MechdiagError) and issubclass(MechdiagError, ValueError)
