"""Replay against full forward passes of each prompt alone, which owe the engine nothing (`tests.tiny.alone`).

Tolerances: `tiny.TOLERANCE` on float32 logits, `tiny.assert_same_effect` on what is formed of them.
"""

import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interventions import ReplayError, Site, intervened_logits, measure, record, wrap
from interventions.replaying import attention, replay
from interventions.replaying.placed import placed
from interventions.replaying.replay import ATTENTIONS, Branches, layout, replayed, row_mask, unembed
from interventions.replaying.replay_check import logit_tolerance
from interventions.sites import POINTS
from tests.tiny import (
    HOOKED,
    LAYERS,
    N_LAYERS,
    REPLAYED,
    TOLERANCE,
    VARIANTS,
    WINDOW,
    all_alone,
    assert_same_effect,
    changed_in,
    edited,
    exact_kl,
    fresh,
    full_logits,
    points_by_turns,
    prompts,
    read,
    recorded,
    rows,
    several,
    sites,
    tiny_model,
    within,
)

ENTRIES = ("0.resid_pre", "0.mlp_out", "2.attn_out", "2.resid_mid", "2.resid_post", "5.mlp_out", "5.resid_post")
ENTRIES = tuple(map(Site.parse, ENTRIES))
"""every point, the first block, one in the middle and the last"""


def attending(hf, way):
    """The model, wrapped anew and replayed in this way: the trial would take the other if this were not exact."""
    model = wrap(hf)
    model.replay_attention = way
    return model


def reach(model):
    """How far replay was found exact: (point, longest branch) -> first block -> longest position."""
    found = {}
    for kept in model.certificates.values():
        for (point, width, block), certificate in kept.exact.items():
            found.setdefault((point, width), {})[block] = certificate.longest
    return found


def refusal(recording, *args, **options):
    """`measure` on a model that replay does not support: what it gave, and what it warned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return measure(recording, *args, **options), [str(w.message) for w in caught]


# Exactness


@pytest.mark.parametrize(("name", "point"), points_by_turns(*REPLAYED, *VARIANTS))
def test_replay_equals_full_forwards_of_each_prompt_alone(name, point, device):
    """Two of the blocks at both ends and in between; one edited position or several; every horizon; both ways to attend.

    By turns, so that each architecture and each point meets each of these; logits are formed by one way to attend where
    metrics are by the other.
    """
    hf, tokens = tiny_model(name, device), prompts()
    models = [attending(hf, way) for way in ATTENTIONS]
    slight, violent = np.inf, 0.0
    start = POINTS.index(point) + (*REPLAYED, *VARIANTS).index(name)
    layers = [layer for i, layer in enumerate(LAYERS) if i != start % 3]
    recording = record(models[0], tokens, [Site(layer, point) for layer in layers])
    recordings = [replace(recording, model=model) for model in models]
    clean = {p: full_logits(name, hf, tokens, None, torch.tensor([p]), torch.tensor([0]), None)[0] for p in range(5)}
    for turn, layer in enumerate(layers, start):
        site = Site(layer, point)
        (prompt, position), horizons = TURNS[turn % len(TURNS)]
        vectors = edited(recordings[0], site, prompt, position)
        slow = full_logits(name, hf, tokens, site, prompt, position, vectors)
        both = slow, [clean[p] for p in prompt.tolist()]
        for horizon in horizons:
            recordings.reverse()
            keep = within(position, horizon).nonzero()[:, 0]
            q, p = (read([logits[i] for i in keep.tolist()], position[keep], horizon) for logits in both)
            some = (site, prompt[keep], position[keep], vectors[keep.to(device)])
            fast = intervened_logits(recordings[0], *some, horizon=horizon, path="replay")
            fast = fast if horizon in (1, "last") else longer(fast, horizon)
            assert torch.equal(fast.isnan(), q.isnan())
            assert (fast - q).abs().nan_to_num(0.0).max() <= TOLERANCE
            assert_effects(measure(recordings[1], *some, metrics=METRICS, horizon=horizon, path="replay"), q, p)
            exact = exact_kl(p, q)
            slight, violent = min(slight, np.nanmin(exact)), max(violent, np.nanmax(exact))
    assert all(reach(model) and not any(c.otherwise for c in model.certificates.values()) for model in models)
    assert slight < 1e-3 and violent > 0.5


TURNS = ((rows(), (5, 1, "last")), (several(), ("last", 5)), (rows(), (12, 1)), (several(), (5, 12)))
METRICS = ("kl", "top1_changed", "clean_entropy")


def assert_effects(effects, slow, clean):
    """What `measure` found by replay is what these logits, nan where nothing is read, say."""
    assert_same_effect(effects["kl"], exact_kl(clean, slow), TOLERANCE)
    read_there = ~slow[..., 0].isnan().cpu()
    assert torch.equal(effects.position >= 0, read_there)
    ties = (slow.topk(2).values.diff().abs().amin(-1) <= 2 * TOLERANCE).cpu()
    changed = (slow.argmax(-1) != clean.argmax(-1)).cpu() & read_there
    assert torch.equal(effects["top1_changed"][~ties], changed[~ties])
    log_p = clean.double().log_softmax(-1).cpu()
    entropy = -(log_p.exp() * log_p).sum(-1)
    assert torch.allclose(effects["clean_entropy"].double(), entropy, atol=1e-5, equal_nan=True)
    assert (effects.path, effects.why_hooks, effects.halvings, effects.n_nonfinite) == ("replay", None, 0, 0)
    assert 0 <= effects.delta <= TOLERANCE


def longer(logits, horizon):
    """As wide as asked for: `intervened_logits` stops at the last position that any row reads."""
    return torch.nn.functional.pad(logits, (0, 0, 0, horizon - logits.shape[1]), value=torch.nan)


def side_by_side():
    """Branches of one prompt, alike and unlike, overlapping and apart, of one token and of many; some edited twice."""
    start = np.array([3, 3, 12, 23, 0, 21, 12, 0])
    length = np.array([1, 9, 12, 1, 24, 3, 1, 2])
    first = np.cumsum(length) - length
    edited = np.unique(np.r_[first, first[[1, 4, 7]] + [4, 13, 1]])
    return Branches(np.zeros_like(start), start, length, edited)


def noisy(recording, site, branches):
    """What stands at the edited tokens, and noise."""
    row = branches.row[branches.edited]
    prompt, position = torch.from_numpy(branches.prompt[row]), torch.from_numpy(branches.position[branches.edited])
    return edited(recording, site, prompt, position)


def one(recording, site, branches, vectors, *rest):
    """`replayed` with an edit at one site of every edited token."""
    return replayed(recording, branches, [placed(recording, site, branches.edited, vectors)], *rest)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    ("name", "site"), [*(("llama", site) for site in ENTRIES), ("opt", ENTRIES[2]), ("gemma3", ENTRIES[4])], ids=str
)
def test_branches_in_one_group_do_not_attend_to_each_other(name, site, attention, device):
    """Branches alone, in pairs or all in one group give the same hidden states."""
    recording, branches = recorded(name, site, device=device), side_by_side()
    vectors = noisy(recording, site, branches)
    single = []
    for i in range(len(branches.prompt)):
        which = torch.from_numpy(branches.row[branches.edited] == i).to(device)
        single.append(one(recording, site, branches.take(np.array([i])), vectors[which], attention))
    single = [torch.cat(parts) for parts in zip(*single, strict=True)]
    assert not torch.allclose(single[0][0], single[0][1], atol=0.1)
    for size in (None, 2, 8):
        together = one(recording, site, branches, vectors, attention, size)
        for found, expected in zip(together, single, strict=True):
            assert torch.allclose(found, expected, atol=TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(("name", "attention"), list(zip(("llama", "gpt2"), ATTENTIONS, strict=True)))
def test_gradients_equal_those_of_a_full_forward(name, point, attention, device):
    """In float64 they agree to 1e-9; gradients of a later token, after two edits."""
    hf, site, tokens = tiny_model(name, device, torch.float64), Site(1, point), prompts()
    recording = record(hf, tokens, [site])
    prompt, first = [0, 1], [12, 5]
    branches = Branches(np.array(prompt), np.array(first), np.array([4, 4]), np.array([0, 2, 4, 6]))
    start = torch.stack(
        [recording.activations[site][p, q] for p, f in zip(prompt, first, strict=True) for q in (f, f + 2)]
    )
    fast = start.clone().requires_grad_()
    logits = unembed(recording, one(recording, site, branches, fast, attention).hidden)
    logits.log_softmax(-1)[[3, 7], 5].sum().backward()

    slow = start.clone().requires_grad_()
    total = 0.0
    for i, (p, f) in enumerate(zip(prompt, first, strict=True)):

        def put(hidden, i=i, f=f):
            where = torch.arange(hidden.shape[1], device=hidden.device)[None, :, None]
            hidden = torch.where(where == f, slow[2 * i], hidden)
            return torch.where(where == f + 2, slow[2 * i + 1], hidden)

        remove = changed_in(name, hf, site, put)
        ids = torch.tensor([tokens[p]], device=device)
        total = total + hf(input_ids=ids).logits[0, f + 3].log_softmax(-1)[5]
        remove()
    total.backward()
    assert slow.grad.abs().amax(-1).min() > 1e-3
    assert torch.allclose(fast.grad, slow.grad, rtol=1e-9, atol=1e-9)


# Dtypes


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float64),
        ("llama", torch.bfloat16),
        ("llama", torch.float16),
        ("gemma3", torch.bfloat16),
        ("gpt2", torch.float16),
    ],
    ids=str,
)
def test_other_dtypes_run_on_the_replay_path(name, dtype, device):
    """Logits agree with full forward passes within `logit_tolerance`, and are about as close to those in float64."""
    tokens, hf = prompts(), tiny_model(name, device, dtype)
    wide = copy.deepcopy(hf).double()
    for site, (prompt, position), horizon in (
        (Site(2), rows(), 1),
        (Site(2, "attn_out"), rows(), 5),
        (Site(2, "mlp_out"), several(), "last"),
    ):
        recording = record(hf, tokens, [site])
        vectors = edited(recording, site, prompt, position)
        options = {"horizon": horizon, "path": "replay"}
        fast = intervened_logits(recording, site, prompt, position, vectors, **options).double()
        slow = all_alone(name, hf, tokens, site, prompt, position, vectors, horizon).double()
        truth = all_alone(name, wide, tokens, site, prompt, position, vectors.double(), horizon)
        allowed = logit_tolerance(dtype, float((truth - truth.mean(-1, keepdim=True)).abs().nan_to_num(0).max()))
        assert (fast - slow).abs().nan_to_num(0).max() <= allowed
        assert (fast - truth).abs().nan_to_num(0).max() <= 3 * (slow - truth).abs().nan_to_num(0).max() + 1e-11
        effects = measure(recording, site, prompt, position, vectors, horizon=horizon)
        assert effects.path == "replay" and 0 <= effects.delta <= allowed
        read_there = effects.position >= 0
        assert effects["kl"][read_there].isfinite().all() and (effects["kl"][read_there] >= 0).all()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_half_precision_logits_use_float32_where_supported(name, monkeypatch):
    """Simulates CUDA's product by widening both factors: the head does not round, and soft-capping still applies."""
    product = torch.mm

    def mm(a, b, *, out_dtype=None):
        return product(a, b) if out_dtype is None else product(a.to(out_dtype), b.to(out_dtype))

    hf = tiny_model(name, "cpu", torch.bfloat16)
    recording = record(hf, prompts(), [Site(2)])
    states = recording.final_hidden[0, :6]
    rounded = unembed(recording, states)
    monkeypatch.setattr(replay, "multiplies_into_float32", lambda device, dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(torch, "mm", mm)
    found = unembed(recording, states)
    exact = states.double() @ hf.get_output_embeddings().weight.double().T
    if cap := getattr(hf.config, "final_logit_softcapping", None):
        exact = cap * torch.tanh(exact / cap)
    assert (rounded.dtype, found.dtype) == (torch.bfloat16, torch.float32)
    assert (found - exact).abs().max() < 1e-5 < 1e-3 < (rounded - exact).abs().max()
    some = torch.tensor([7, 2])
    alone = unembed(recording, states, some)  # as precise when it is asked for few tokens
    assert alone.dtype == torch.float32 and (alone - exact[:, some]).abs().max() < 1e-5
    prompt, position = rows()
    vectors = edited(recording, Site(2), prompt, position)
    effects = measure(recording, Site(2), prompt, position, vectors, metrics=("kl", "kl_direct"))
    assert effects.path == "replay" and effects["kl"].isfinite().all() and effects["kl_direct"].isfinite().all()


# Identities


@pytest.mark.parametrize(("name", "point"), points_by_turns(*REPLAYED, *VARIANTS, turn=1))
def test_identity_edit_has_zero_kl(name, point, device):
    """Float32 logits agree to 1e-5, so KL is about (1e-5)²; the test asks for 1e-9."""
    i = POINTS.index(point)
    site = Site(LAYERS[i % 3], point)
    (prompt, position), horizon = ((rows(), 12), (several(), "last"))[i % 2]
    recording = recorded(name, site, device=device)
    at = prompt if position.ndim == 1 else prompt[:, None]
    clean = recording.activations[site][at, position.clamp(min=0)]
    for path, some in (("replay", slice(None)), ("hooks", slice(0, None, 7))):
        effects = measure(
            *(recording, site, prompt[some], position[some], clean[some]),
            metrics=("kl", "js", "kl_direct"),
            horizon=horizon,
            path=path,
        )
        for value in effects.values.values():
            assert value[effects.position >= 0].abs().max() <= 1e-9


# Models that replay does not support


@pytest.mark.parametrize("name", HOOKED)
def test_unsupported_models_fall_back_to_full_forwards(name, device):
    """Whether the first call has one position, longer branches or several positions."""
    hf, tokens = tiny_model(name, device), prompts()
    for turn, site in enumerate(sites(name, (2,))):
        (prompt, position), horizon = ((rows(), 1), (several(), "last"), (several(), 12), (rows(), 5))[turn % 4]
        recording = record(wrap(hf), tokens, [site])
        keep = within(position, horizon)
        prompt, position = prompt[keep][::2], position[keep][::2]
        vectors = edited(recording, site, prompt, position)
        some = recording, site, prompt, position, vectors
        effects, warned = refusal(*some, horizon=horizon)
        assert effects.path == "hooks" and effects.why_hooks
        assert len(warned) == 1 and "falls back to full forward passes" in warned[0] and effects.why_hooks in warned[0]
        clean = all_alone(name, hf, tokens, site, prompt, position, None, horizon)
        slow = all_alone(name, hf, tokens, site, prompt, position, vectors, horizon)
        assert_same_effect(effects["kl"], exact_kl(clean, slow), TOLERANCE)
        again, warned = refusal(*some, horizon=horizon)
        assert not warned and torch.equal(again["kl"].nan_to_num(), effects["kl"].nan_to_num())
        for call in (measure, intervened_logits):
            with pytest.raises(ReplayError, match="replay is not exact here"):
                call(*some, horizon=horizon, path="replay")


def test_a_recording_without_keys_is_not_replayed(device):
    site, (prompt, position) = Site(2), rows()
    recording = record(tiny_model("llama", device), prompts(), [site], keep_cache=False)
    with pytest.warns(UserWarning, match="falls back to full forward passes .* no keys and values were recorded"):
        effects = measure(recording, site, prompt, position, edited(recording, site, prompt, position))
    assert effects.path == "hooks" and "no keys" in effects.why_hooks
    with pytest.raises(ReplayError, match="no keys and values"):
        measure(recording, site, prompt, position, edited(recording, site, prompt, position), path="replay")


CALLS = {
    "many positions": [[(0, p) for p in (23, 0, 3, 5, 9, 9, 12, 20)]],
    "one row, then many": [[(0, 23)], [(0, p) for p in (23, 0, 3, 5, 9, 12, 20)]],
    "first tokens, then many": [[(0, 0), (0, 0), (1, 0)], [(0, p) for p in (0, 3, 9, 22)]],
    "last block, then many": [None, [(0, p) for p in (23, 3, 9, 12)]],
    "edits of one token": [[(0, 12)] * 6],
    "second token only": [[(0, 1)] * 6],
}


@pytest.mark.parametrize(
    ("name", "calls"),
    [*(("gpt_neo", calls) for calls in CALLS), ("mpt", "many positions"), ("mpt", "one row, then many")],
)
def test_models_that_ignore_masks_are_detected(name, calls, device):
    """A single row at the last position is right even without a mask; later calls must be right too."""
    hf, tokens, site = tiny_model(name, device), prompts(), Site(2)
    recording = record(hf, tokens, [site, Site(N_LAYERS - 1)])
    for pairs in CALLS[calls]:
        here = site if pairs else Site(N_LAYERS - 1)
        prompt, position = rows(pairs or [(0, 23), (0, 3), (1, 4)])
        vectors = edited(recording, here, prompt, position)
        effects, _ = refusal(recording, here, prompt, position, vectors)
        clean = all_alone(name, hf, tokens, here, prompt, position, None)
        slow = all_alone(name, hf, tokens, here, prompt, position, vectors)
        assert_same_effect(effects["kl"], exact_kl(clean, slow), TOLERANCE)


def test_nonfinite_rows_do_not_pass_the_replay_check(device):
    """Otherwise the check would use these rows, which are the longest."""
    hf, tokens, site = tiny_model("gpt_neo", device), prompts(), Site(2)
    recording = record(hf, tokens, [site])
    prompt, position = rows([(0, 23), (3, 23), (0, 3), (0, 9), (0, 12)])
    vectors = edited(recording, site, prompt, position)
    slow = all_alone("gpt_neo", hf, tokens, site, prompt, position, vectors)
    vectors[:2] = float("nan")
    effects, _ = refusal(recording, site, prompt, position, vectors, nonfinite="count")
    clean = all_alone("gpt_neo", hf, tokens, site, prompt, position, None)
    assert effects.n_nonfinite == 2
    assert_same_effect(effects["kl"][2:], exact_kl(clean, slow)[2:], TOLERANCE)


# Windows and reach


@pytest.mark.parametrize("name", ["mistral_window", "gemma3", "gemma2"])
def test_replay_is_exact_beyond_the_sliding_window(name, device):
    """Tests each position around the window's edge; only beyond it does the window change logits."""
    hf, tokens, site = fresh(name, device), prompts(), Site(0, "resid_pre")
    recording = record(hf, tokens, [site])
    prompt, position = rows([(0, p) for p in range(2 * WINDOW + 3)])
    vectors = edited(recording, site, prompt, position)
    fast = intervened_logits(recording, site, prompt, position, vectors, path="replay")
    slow = all_alone(name, hf, tokens, site, prompt, position, vectors)
    assert (fast - slow).abs().max() <= TOLERANCE
    hf.config.sliding_window = 64
    for module in hf.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = 64
    wide = all_alone(name, hf, tokens, site, prompt, position, vectors)
    assert (wide - slow)[:WINDOW].abs().max() <= TOLERANCE
    assert (wide - slow)[WINDOW:].abs().amax(-1).min() > 100 * TOLERANCE


def test_longer_positions_and_longer_branches_are_checked_again(device):
    """Checks are kept by site, longest branch (rounded up to a power of 2), first block and longest position."""
    model = wrap(fresh("mistral_window", device))
    site, later, inside = Site(1), Site(3), Site(3, "attn_out")
    recording = record(model, prompts(), [site, later, inside])

    def run(where, *pairs, horizon=1):
        prompt, position = rows(pairs)
        vectors = edited(recording, where, prompt, position)
        assert measure(recording, where, prompt, position, vectors, horizon=horizon).path == "replay"

    single, branch = ("resid_post", 1), ("resid_post", 8)
    assert reach(model) == {}
    run(site, (0, 3), (1, 2))
    assert reach(model) == {single: {2: 3}}
    run(site, (0, 2))
    assert reach(model) == {single: {2: 3}}
    run(site, (0, 20), (0, 1))
    assert reach(model) == {single: {2: 20}}
    run(later, (0, 20))  # what is exact from block 2 is exact from block 4
    assert reach(model) == {single: {2: 20}}
    run(later, (3, 23))
    assert reach(model) == {single: {2: 20, 4: 23}}
    run(site, (0, 3), (0, 8), horizon=6)
    assert reach(model) == {single: {2: 20, 4: 23}, branch: {2: 13}}
    run(site, (0, 3), horizon=8)  # as long after rounding, and no further
    run(later, (0, 5), horizon=8)
    assert reach(model) == {single: {2: 20, 4: 23}, branch: {2: 13}}
    run(site, (0, 3), horizon="last")
    assert reach(model) == {single: {2: 20, 4: 23}, branch: {2: 13}, ("resid_post", 32): {2: 23}}
    run(inside, (0, 3))
    assert reach(model)["attn_out", 1] == {3: 3}


@pytest.mark.parametrize("way", ATTENTIONS)
@pytest.mark.parametrize("wrong", ["none", "as long as the clean keys only"])
def test_missing_window_within_long_branches_is_detected(wrong, way, monkeypatch, device):
    """Simulates attention without the window among a branch's own keys; branches within the window stay right."""
    hf, tokens, site = tiny_model("mistral_window", device), prompts(), Site(1)
    real_hidden, real_mask = attention.RowAttention.hidden, replay.row_mask

    def forgetful(real, *args, window):
        """What is hidden among the branch's own keys as if there were no window."""
        if wrong == "none":
            return real(*args, None)
        kept, n = real(*args, window), args[0].n_clean
        return torch.cat([kept[..., :n], real(*args, None)[..., n:]], dim=-1)

    def hidden(self, window):
        self.masks = {}
        return forgetful(real_hidden, self, window=window).clone()

    def mask(rows, dtype, window=None):
        return forgetful(lambda r, w: real_mask(r, dtype, w), rows, window=window)

    monkeypatch.setattr(attention.RowAttention, "hidden", hidden)
    monkeypatch.setattr(replay, "row_mask", mask)
    model = attending(hf, way)
    recording = record(model, tokens, [site])
    found = []
    for pairs, horizon in (([(0, 3), (1, 7)], 1), ([(0, 0), (1, 1)], WINDOW), ([(0, 0), (2, 1), (0, 4)], WINDOW + 4)):
        prompt, position = rows(pairs)
        vectors = edited(recording, site, prompt, position)
        effects, warned = refusal(recording, site, prompt, position, vectors, horizon=horizon)
        clean = all_alone("mistral_window", hf, tokens, site, prompt, position, None, horizon)
        slow = all_alone("mistral_window", hf, tokens, site, prompt, position, vectors, horizon)
        assert_same_effect(effects["kl"], exact_kl(clean, slow), TOLERANCE)
        found.append((effects.path, len(warned)))
    assert found[0] == ("replay", 0) and found[-1][0] == "hooks" and sum(n for _, n in found) == 1


# What is left behind


@pytest.mark.parametrize(
    ("name", "site"), list(zip(("llama", "gpt2", "gpt_neo", "opt"), (ENTRIES[0], *ENTRIES[2:5]), strict=True)), ids=str
)
def test_measuring_leaves_the_model_unchanged(name, site, device):
    hf = fresh(name, device)
    ids = torch.tensor([prompts()[0]], device=device)
    before = hf(input_ids=ids).logits
    recording = record(hf, prompts(), [site])
    prompt, position = rows()
    for horizon in (1, "last"):
        refusal(recording, site, prompt, position, edited(recording, site, prompt, position), horizon=horizon)
    assert torch.equal(hf(input_ids=ids).logits, before)
    assert_untouched(hf)


def assert_untouched(hf):
    for module in hf.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert hf.config._attn_implementation in ("eager", "sdpa")


# The pieces


def branches_of(triples, edited=()):
    """Branches given as (prompt, start, length)."""
    prompt, start, length = (np.array(column) for column in zip(*triples, strict=True))
    return Branches(prompt, start, length, np.array(edited, dtype=int))


triples = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 20), st.integers(1, 12)), min_size=1, max_size=20)
CPU = torch.device("cpu")


@given(st.one_of(st.none(), st.integers(1, 25)), triples, st.one_of(st.none(), st.integers(1, 5)))
def test_row_mask_shows_the_last_tokens_of_the_window(window, given_branches, size):
    """A token at p sees the `window` last tokens up to itself, p − window < key ≤ p: those before its branch clean, the
    others of its branch, and every position once."""
    branches = branches_of(sorted(given_branches))
    laid = layout(branches, CPU, 24, 0.0, size)
    mask = row_mask(laid, torch.float16, window)[:, 0]
    assert set(mask.flatten().tolist()) <= {0.0, torch.finfo(torch.float16).min}
    n_slot = laid.shape[1]
    position = torch.cat([torch.arange(laid.n_clean).expand(len(mask), -1), laid.position], dim=1)
    for token, slot in enumerate(laid.slot.tolist()):
        group, p = slot // n_slot, int(branches.position[token])
        seen = (mask[group, slot % n_slot] == 0).nonzero()[:, 0]
        lowest = 0 if window is None else max(0, p - window + 1)
        assert position[group, seen].tolist() == list(range(lowest, p + 1))
        own = seen[seen >= laid.n_clean] - laid.n_clean + group * n_slot
        branch = laid.slot[torch.from_numpy(branches.row == branches.row[token])].tolist()
        assert own.tolist() == branch[max(0, lowest - branches.start[branches.row[token]]) : branches.place[token] + 1]


@given(triples)
def test_branches_list_their_tokens_in_order(given_branches):
    branches = branches_of(sorted(given_branches))
    expected = [
        (row, place, start + place)
        for row, (_, start, length) in enumerate(sorted(given_branches))
        for place in range(length)
    ]
    columns = (branches.row, branches.place, branches.position)
    assert [tuple(map(int, token)) for token in zip(*columns, strict=True)] == expected
    assert branches.n_tokens == len(expected)
    assert (branches.place[branches.first] == 0).all() and (np.diff(branches.first) == branches.length[:-1]).all()


@given(triples, st.data())
def test_take_returns_the_chosen_branches(given_branches, data):
    """The chosen branches are neighbours and keep their edits."""
    whole = branches_of(sorted(given_branches))
    n = len(whole.prompt)
    start = data.draw(st.integers(0, n - 1))
    taken = np.arange(start, data.draw(st.integers(start, n - 1)) + 1)
    edits = sorted(data.draw(st.sets(st.integers(0, whole.n_tokens - 1), min_size=1)))
    whole = Branches(whole.prompt, whole.start, whole.length, np.array(edits))
    part = whole.take(taken)
    among = np.isin(whole.row, taken)
    for name in ("place", "position"):
        assert getattr(part, name).tolist() == getattr(whole, name)[among].tolist()
    assert part.prompt.tolist() == whole.prompt[taken].tolist()
    marked = np.isin(np.arange(whole.n_tokens), edits)[among]
    assert part.edited.tolist() == np.flatnonzero(marked).tolist()


@given(triples, st.sampled_from([0.0, 384.0]), st.one_of(st.none(), st.integers(1, 9)))
def test_layout_gives_each_token_a_slot_of_its_prompt(given_branches, cost, size):
    branches = branches_of(sorted(given_branches))
    found = layout(branches, CPU, 24, cost, size)
    n_group, n_slot = found.shape
    slot = found.slot.numpy()
    assert len(set(slot.tolist())) == branches.n_tokens
    assert found.group_prompt[slot // n_slot].tolist() == branches.prompt[branches.row].tolist()
    assert found.position.flatten()[slot].tolist() == branches.position.tolist()
    assert found.start.flatten()[slot].tolist() == branches.start[branches.row].tolist()
    assert set((slot // n_slot).tolist()) == set(range(n_group))
    assert (slot % found.width == branches.place).all()  # each branch from the first slot of a branch's own
    assert len(set((slot // found.width).tolist())) == len(branches.prompt)
    assert found.width == branches.length.max() and n_slot % found.width == 0
    assert found.n_clean == branches.start.max() and size in (None, n_slot // found.width)
    padding = torch.ones(n_group * n_slot, dtype=torch.bool).index_fill(0, found.slot, False)
    assert (found.position.flatten()[padding] == 0).all() and (found.start.flatten()[padding] == 0).all()
