"""Replay against full forward passes of each prompt alone, which owe the engine nothing (`tests.tiny.alone`).

Tolerances: `tiny.TOLERANCE` on float32 logits, `tiny.assert_same_effect` on what is formed of them.
"""

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interventions import ReplayError, Site, intervened_logits, measure, record, wrap
from interventions.replay import ATTENTIONS, Layout, final_hidden, layout, row_mask, unembed
from interventions.trust import logit_tolerance
from tests.tiny import (
    HOOKED,
    N_LAYERS,
    REPLAYED,
    SITES,
    TOLERANCE,
    VOCAB,
    WINDOW,
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

sites = pytest.mark.parametrize("site", SITES, ids=str)


def refusal(recording, *args, **options):
    """`measure` on a model that replay does not serve: what it gave, and what it warned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return measure(recording, *args, **options), [str(w.message) for w in caught]


# Exactness


@sites
@pytest.mark.parametrize("name", REPLAYED)
def test_replay_equals_full_forwards_of_each_prompt_alone(name, site, device):
    hf, tokens, (prompt, position) = tiny_model(name, device), prompts(), rows()
    recording = record(hf, tokens, [site])
    vectors = edited(recording, site, prompt, position)
    slow = all_alone(name, hf, tokens, site, prompt, position, vectors)
    clean = all_alone(name, hf, tokens, site, prompt, position, None)

    fast = intervened_logits(recording, site, prompt, position, vectors, path="replay")
    fast_clean = unembed(recording, recording.final_hidden[prompt.to(device), position.to(device)])
    delta = float(torch.maximum((fast - slow).abs().max(), (fast_clean - clean).abs().max()))
    assert delta <= TOLERANCE

    effects = measure(
        recording, site, prompt, position, vectors, metrics=("kl", "top1_changed", "clean_entropy"), path="replay"
    )
    exact = exact_kl(clean, slow)
    assert exact.min() < 1e-3 and exact.max() > 0.5  # slight edits and violent ones
    assert_same_effect(effects["kl"], exact, delta)
    changed = slow.argmax(-1) != clean.argmax(-1)
    assert torch.equal(effects["top1_changed"], changed.cpu()) and changed.any() and not changed.all()
    log_p = clean.double().log_softmax(-1)
    assert torch.allclose(effects["clean_entropy"].double(), -(log_p.exp() * log_p).sum(-1).cpu(), atol=1e-5)
    assert (effects.path, effects.why_hooks, effects.halvings, effects.n_nonfinite) == ("replay", None, 0, 0)
    assert 0 <= effects.delta <= TOLERANCE


@pytest.mark.parametrize("name", REPLAYED)
def test_padded_tensors_give_what_lists_give(name, device):
    """The padding's token ids are arbitrary; a prompt's own tokens go through the same pass in all three."""
    site, tokens, (prompt, position) = Site(2), prompts(), rows()
    width = max(map(len, tokens))
    expected = None
    for side in ("list", "right", "left"):
        given_tokens, mask = tokens, None
        if side != "list":
            given_tokens = torch.full((len(tokens), width), 7, device=device)
            mask = torch.zeros(len(tokens), width, dtype=torch.long, device=device)
            for i, ids in enumerate(tokens):
                at = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
                given_tokens[i, at], mask[i, at] = torch.tensor(ids, device=device), 1
        recording = record(tiny_model(name, device), given_tokens, [site], attention_mask=mask)
        kl = measure(recording, site, prompt, position, edited(recording, site, prompt, position), path="replay")["kl"]
        if expected is None:
            expected = kl
        assert torch.equal(kl, expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", REPLAYED)
def test_both_ways_to_attend_are_exact(name, attention, device):
    """Which of them a model takes is for the engine to choose; one that is exact only by luck would be found here."""
    hf, site, tokens = tiny_model(name, device), Site(0, "resid_pre"), prompts()
    recording = record(hf, tokens, [site])
    prompt, position = rows()
    vectors = edited(recording, site, prompt, position)
    slow = all_alone(name, hf, tokens, site, prompt, position, vectors)
    fast = unembed(recording, final_hidden(recording, 0, prompt.numpy(), position.numpy(), vectors, attention))
    assert (fast - slow).abs().max() <= TOLERANCE


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("first_block", [0, 2, N_LAYERS])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_rows_side_by_side_do_not_see_each_other(name, first_block, attention, device):
    """One by one, in pairs, or all in one group: the same hidden states."""
    recording = record(tiny_model(name, device), prompts())
    position = np.array([3, 3, 12, 23, 0, 23, 12])
    prompt = np.zeros_like(position)
    vectors = noise(len(prompt), device)
    single = torch.cat(
        [
            final_hidden(recording, first_block, prompt[:1], position[i : i + 1], vectors[i : i + 1], attention)
            for i in range(len(prompt))
        ]
    )
    assert not torch.allclose(single[0], single[1], atol=0.1)
    for size in (None, 1, 2, 7, 16):
        together = final_hidden(recording, first_block, prompt, position, vectors, attention, size)
        assert torch.allclose(together, single, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_those_of_a_full_forward(name, attention, device):
    """float64, so that they agree to 1e-9 of their size."""
    hf, site, tokens = tiny_model(name, device, torch.float64), Site(1), prompts()
    recording = record(hf, tokens, [site])
    prompt, position = np.array([0, 1]), np.array([12, 9])
    start = recording.at(site, torch.from_numpy(prompt), torch.from_numpy(position))
    fast = start.clone().requires_grad_()
    logits = unembed(recording, final_hidden(recording, site.first_block, prompt, position, fast, attention))
    logits.log_softmax(-1)[:, 5].sum().backward()

    slow = start.clone().requires_grad_()
    total = 0.0
    block = wrap(hf).blocks[site.layer]
    for i in range(2):
        where = int(position[i])

        def put(_, __, out, i=i, where=where):
            row = torch.arange(out.shape[1], device=out.device)[None, :, None] == where
            return torch.where(row, slow[i], out)

        handle = block.register_forward_hook(put)
        ids = torch.tensor([tokens[int(prompt[i])]], device=device)
        total = total + hf(input_ids=ids).logits[0, where].log_softmax(-1)[5]
        handle.remove()
    total.backward()
    assert slow.grad.abs().max() > 1e-3
    assert torch.allclose(fast.grad, slow.grad, rtol=1e-9, atol=1e-9)


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_other_dtypes_run_on_the_replay_path(name, dtype, device):
    """Within what `logit_tolerance` allows of full forward passes, and much as near as these to the same weights in float64."""
    site, tokens, (prompt, position) = Site(2), prompts(), rows()
    hf = tiny_model(name, device, dtype)
    recording = record(hf, tokens, [site])
    vectors = edited(recording, site, prompt, position)
    fast = intervened_logits(recording, site, prompt, position, vectors, path="replay").double()
    slow = all_alone(name, hf, tokens, site, prompt, position, vectors).double()
    truth = all_alone(name, copy.deepcopy(hf).double(), tokens, site, prompt, position, vectors.double())
    allowed = logit_tolerance(dtype, float((truth - truth.mean(-1, keepdim=True)).abs().max()))
    assert (fast - slow).abs().max() <= allowed
    assert (fast - truth).abs().max() <= 3 * (slow - truth).abs().max() + 1e-11
    effects = measure(recording, site, prompt, position, vectors)
    assert effects.path == "replay" and 0 <= effects.delta <= allowed
    assert effects["kl"].isfinite().all() and (effects["kl"] >= 0).all()


# Identities


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt_neox"])
def test_an_edit_that_changes_nothing_has_no_effect(name, site, device):
    """Float32: logits within 1e-5, so a KL of (1e-5)² at most; 1e-9 is asked for."""
    recording = record(tiny_model(name, device), prompts(), [site])
    prompt, position = rows()
    effects = measure(recording, site, prompt, position, recording.at(site, prompt, position), metrics=("kl", "js"))
    assert effects["kl"].max() <= 1e-9 and effects["js"].max() <= 1e-9


@pytest.mark.parametrize("factor", [0.5, 3.0])
@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2", "gpt2", "phi"])
def test_the_final_norm_does_not_see_a_norm(name, factor, device):
    """Behind the last block only the final norm follows: x and c·x differ there by eps/var(x), 1e-6 or less here."""
    last, tokens, (prompt, position) = Site(N_LAYERS - 1), prompts(), rows()
    recording = record(tiny_model(name, device), tokens, [last, Site(2)])
    stream = recording.at(last, prompt, position)
    assert stream.var(-1).min() > 1  # or else eps would be seen, 1e-5 at most
    assert measure(recording, last, prompt, position, factor * stream)["kl"].max() <= 1e-9
    early = recording.at(Site(2), prompt, position)
    assert measure(recording, Site(2), prompt, position, factor * early)["kl"].min() > 1e-4  # blocks above do see it


# Models that replay cannot serve


@pytest.mark.parametrize("name", HOOKED)
def test_what_replay_cannot_serve_goes_through_full_forwards(name, device):
    hf, tokens, (prompt, position) = tiny_model(name, device), prompts(), rows()
    site = Site(2)
    recording = record(hf, tokens, [site])
    vectors = edited(recording, site, prompt, position)
    effects, warned = refusal(recording, site, prompt, position, vectors)
    assert effects.path == "hooks" and effects.why_hooks
    assert len(warned) == (0 if name == "mamba" else 1)  # that mamba has no keys is known without a trial
    assert all("full forward passes are used instead" in message for message in warned)
    clean = all_alone(name, hf, tokens, site, prompt, position, None)
    slow = all_alone(name, hf, tokens, site, prompt, position, vectors)
    assert_same_effect(effects["kl"], exact_kl(clean, slow), TOLERANCE)
    again, warned = refusal(recording, site, prompt, position, vectors)
    assert not warned and torch.equal(again["kl"], effects["kl"])
    with pytest.raises(ReplayError, match="replay is not exact here"):
        measure(recording, site, prompt, position, vectors, path="replay")
    with pytest.raises(ReplayError, match="replay is not exact here"):
        intervened_logits(recording, site, prompt, position, vectors, path="replay")


def test_a_recording_without_keys_is_not_replayed(device):
    site, (prompt, position) = Site(2), rows()
    recording = record(tiny_model("llama", device), prompts(), [site], keep_cache=False)
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


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", ["gpt_neo", "mpt"])
def test_a_model_that_ignores_masks_is_found_out(name, calls, device):
    """A row that stands alone at the last position would be right without a mask: whatever comes first, what comes is right."""
    hf, tokens, site = tiny_model(name, device), prompts(), Site(2)
    recording = record(hf, tokens, [site, Site(N_LAYERS - 1)])
    for pairs in calls:
        here = site if pairs else Site(N_LAYERS - 1)
        prompt, position = rows(pairs or [(0, 23), (0, 3), (1, 4)])
        vectors = edited(recording, here, prompt, position)
        effects, _ = refusal(recording, here, prompt, position, vectors)
        clean = all_alone(name, hf, tokens, here, prompt, position, None)
        slow = all_alone(name, hf, tokens, here, prompt, position, vectors)
        assert_same_effect(effects["kl"], exact_kl(clean, slow), TOLERANCE)


def test_vectors_that_are_not_finite_do_not_vouch_for_replay(device):
    """The longest rows are the ones that the check would try."""
    hf, tokens, site = tiny_model("gpt_neo", device), prompts(), Site(2)
    recording = record(hf, tokens, [site])
    prompt, position = rows([(0, 23), (3, 23), (0, 3), (0, 9), (0, 12)])
    vectors = edited(recording, site, prompt, position)
    slow = all_alone("gpt_neo", hf, tokens, site, prompt, position, vectors)
    vectors[:2] = float("nan")
    effects, _ = refusal(recording, site, prompt, position, vectors)
    clean = all_alone("gpt_neo", hf, tokens, site, prompt, position, None)
    assert effects.n_nonfinite == 2
    assert_same_effect(effects["kl"][2:], exact_kl(clean, slow)[2:], TOLERANCE)


# Windows and reach


@pytest.mark.parametrize("name", ["mistral_window", "gemma3", "gemma2"])
def test_positions_beyond_the_window(name, device):
    """Each position around the window's edge; without a window these models give other numbers there, and only there."""
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


def test_longer_positions_are_checked_again(device):
    model = wrap(fresh("mistral_window", device))
    site, later = Site(1), Site(3)
    recording = record(model, prompts(), [site, later])

    def run(where, *pairs):
        prompt, position = rows(pairs)
        assert measure(recording, where, prompt, position, edited(recording, where, prompt, position)).path == "replay"

    assert model.replay_reach == {}
    run(site, (0, 3), (1, 2))
    assert model.replay_reach == {2: 3}
    run(site, (0, 2))
    assert model.replay_reach == {2: 3}
    run(site, (0, 20), (0, 1))
    assert model.replay_reach == {2: 20}
    run(later, (0, 20))  # what is exact from block 2 is exact from block 4
    assert model.replay_reach == {2: 20}
    run(later, (3, 23))
    assert model.replay_reach == {2: 20, 4: 23}


def test_a_window_that_replay_does_not_know_is_found_out_when_positions_pass_it(device):
    """Short positions go by replay and are right; the first call beyond the window is checked, refused, and right too."""
    hf, tokens, site = tiny_model("mistral_window", device), prompts(), Site(1)
    model = wrap(fresh("mistral_window", device))
    recording = record(model, tokens, [site])
    model.__dict__["config"] = copy.copy(model.config)
    model.config.sliding_window = None  # the engine believes that there is none; the model still has it
    found = []
    for pairs in ([(0, 3), (1, 7)], [(0, 3), (0, 20), (0, 12)]):
        prompt, position = rows(pairs)
        vectors = edited(recording, site, prompt, position)
        effects, warned = refusal(recording, site, prompt, position, vectors)
        clean = all_alone("mistral_window", hf, tokens, site, prompt, position, None)
        slow = all_alone("mistral_window", hf, tokens, site, prompt, position, vectors)
        assert_same_effect(effects["kl"], exact_kl(clean, slow), TOLERANCE)
        found.append((effects.path, len(warned)))
    assert found == [("replay", 0), ("hooks", 1)]


# What is left behind


@pytest.mark.parametrize("site", [Site(0, "resid_pre"), Site(2), Site(N_LAYERS - 1)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neo", "opt"])
def test_nothing_is_left_on_the_model(name, site, device):
    hf = fresh(name, device)
    ids = torch.tensor([prompts()[0]], device=device)
    before = hf(input_ids=ids).logits
    recording = record(hf, prompts(), [site])
    prompt, position = rows()
    refusal(recording, site, prompt, position, edited(recording, site, prompt, position))
    assert torch.equal(hf(input_ids=ids).logits, before)
    assert_untouched(hf)


@pytest.mark.parametrize("site", [Site(0, "resid_pre"), Site(2)], ids=str)
def test_nothing_is_left_on_a_model_that_raised(site, device):
    """Both paths, with an error in the middle of the model."""
    hf = fresh("llama", device)
    ids = torch.tensor([prompts()[0]], device=device)
    before = hf(input_ids=ids).logits
    recording = record(hf, prompts(), [site])
    prompt, position = rows()
    vectors = edited(recording, site, prompt, position)
    measure(recording, site, prompt, position, vectors)

    def fail(*_):
        raise KeyError("in the middle")

    broken = hf.model.layers[4].mlp.register_forward_pre_hook(fail)
    for call in (
        lambda: measure(recording, site, prompt, position, vectors, path="replay"),
        lambda: measure(recording, site, prompt, position, vectors, path="hooks"),
        lambda: record(hf, prompts(), [site]),
    ):
        with pytest.raises(KeyError, match="in the middle"):
            call()
    broken.remove()
    assert torch.equal(hf(input_ids=ids).logits, before)
    assert_untouched(hf)


def assert_untouched(hf):
    for module in hf.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks and not module._forward_pre_hooks


# The pieces


def laid_out(positions, n_clean):
    """Groups given by the positions of their slots; which rows they hold does not matter to a mask."""
    position = torch.tensor(positions)
    return Layout(torch.arange(position.numel()), torch.arange(len(position)), position, n_clean)


def test_row_mask_of_three_slots():
    """Two prompts' groups: a slot sees clean keys before its position, and of the slots only itself."""
    mask = row_mask(laid_out([[0, 2, 3], [1, 1, 3]], 3), torch.float32)
    seen = (mask[:, 0] == 0).int()
    assert mask.shape == (2, 1, 3, 6)
    assert seen[0].tolist() == [[0, 0, 0, 1, 0, 0], [1, 1, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1]]
    assert seen[1].tolist() == [[1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1]]
    assert (mask[seen[:, None] == 0] == torch.finfo(torch.float32).min).all()


@given(st.integers(1, 12), st.lists(st.integers(0, 20), min_size=1, max_size=5))
def test_row_mask_within_a_window(window, positions):
    """A token at p sees the `window` last tokens up to itself: p − window < key ≤ p."""
    n_clean = max(positions)
    mask = row_mask(laid_out([positions], n_clean), torch.float16, window)[0, 0]
    for slot, p in enumerate(positions):
        seen = (mask[slot] == 0).nonzero()[:, 0].tolist()
        assert seen == [k for k in range(n_clean) if p - window < k < p] + [n_clean + slot]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.integers(0, 200),
    st.sampled_from([0.0, 384.0]),
    st.one_of(st.none(), st.integers(1, 9)),
)
def test_layout_gives_each_row_a_slot_of_its_prompt(counts, longest, cost, size):
    prompt = np.repeat(np.arange(len(counts)) * 3, counts)
    position = np.random.default_rng(0).integers(0, longest + 1, len(prompt))
    found = layout(prompt, position, torch.device("cpu"), cost, size)
    n_group, n_slot = found.shape
    assert len(set(found.slot.tolist())) == len(prompt)
    assert found.group_prompt[found.slot // n_slot].tolist() == prompt.tolist()
    assert found.position.flatten()[found.slot].tolist() == position.tolist()
    assert set((found.slot // n_slot).tolist()) == set(range(n_group))
    assert found.n_clean == position.max() and size in (None, n_slot)
    padding = torch.ones(n_group * n_slot, dtype=torch.bool).index_fill(0, found.slot, False)
    assert (found.position.flatten()[padding] == 0).all()


@pytest.mark.parametrize("name", [*REPLAYED, "gpt_neo", "bloom"])
def test_unembed_is_the_models_own_head(name, device):
    """Soft caps and scaling included: the clean logits of every token."""
    hf, tokens = tiny_model(name, device), prompts()
    recording = record(hf, tokens)
    ids = torch.tensor([tokens[0]], device=device)
    logits = unembed(recording, recording.final_hidden[0, : len(tokens[0])])
    assert logits.shape == (len(tokens[0]), VOCAB)
    assert torch.allclose(logits, hf(input_ids=ids).logits[0], atol=TOLERANCE, rtol=0)
