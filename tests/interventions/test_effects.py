"""`measure`: what must not matter does not, what is compared is what was asked for, and what goes wrong is said.

Which rows share a chunk changes the order of sums: float32 logits within 1e-5 of each other, and KL within
`tiny.assert_same_effect` of that.
"""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from interventions import (
    EditError,
    MechdiagError,
    ModelError,
    Put,
    Reference,
    Site,
    SiteError,
    intervened_logits,
    measure,
    measure_joint,
    record,
    wrap,
)
from interventions.metrics import METRICS, LogitDifference, Probability, Rank, js_divergence
from interventions.replaying import chunks as module
from interventions.replaying import replay_check as trust
from interventions.replaying.replay import unembed
from interventions.replaying.replay_check import logit_tolerance
from interventions.sites import POINTS
from tests.tiny import (
    D_MODEL,
    HOOKED,
    LENGTHS,
    N_LAYERS,
    REPLAYED,
    TOLERANCE,
    VOCAB,
    all_alone,
    assert_same_effect,
    changed_in,
    edited,
    exact_kl,
    forward_alone,
    fresh,
    noise,
    points_by_turns,
    prompts,
    recorded,
    rows,
    several,
    tiny_model,
    within,
)

SITE, MIDDLE, LAST = Site(2), Site(2, "resid_mid"), Site(N_LAYERS - 1)
PATHS = pytest.mark.parametrize("path", ["replay", "hooks"])
SHUFFLED_CHUNKS = 1e-5
METRICS_OF_ALL_KINDS = (*METRICS, "kl_direct", LogitDifference([3], [4, 5]), Probability(7), Rank(11))


def setting(device, name="llama", site=SITE, pairs=None):
    recording = recorded(name, site, device=device)
    prompt, position = rows() if pairs is None else rows(pairs)
    return recording, prompt, position, edited(recording, site, prompt, position)


def setting_of_several(device, name="llama", site=MIDDLE, horizon="last"):
    recording = recorded(name, site, device=device)
    prompt, position = several()
    keep = within(position, horizon)
    prompt, position = prompt[keep], position[keep]
    return recording, prompt, position, edited(recording, site, prompt, position)


def same(found, expected):
    assert_same_effect(found, expected, SHUFFLED_CHUNKS)


def same_values(found, expected, tolerance=SHUFFLED_CHUNKS):
    """Every metric, of whatever kind, and where it was read; a tie of two tokens may fall either way."""
    assert list(found.values) == list(expected.values)
    assert torch.equal(found.position, expected.position)
    for name, value in found.values.items():
        if name.startswith("kl") or name == "js":
            assert_same_effect(value, expected[name], tolerance)
        elif name in ("top1_changed", "rank", "clean_rank"):
            assert ((value.float() - expected[name].float()).abs().nan_to_num(0) <= 1).all()
            assert (value != expected[name]).float().nan_to_num(0).mean() <= value.float().isnan().float().mean() + 0.02
        else:
            assert torch.allclose(value, expected[name], atol=10 * tolerance, equal_nan=True)


# What must not matter


def test_lists_and_names_equal_tensors_and_sites(device):
    recording, prompt, position, vectors = setting(device)
    expected = measure(recording, SITE, prompt, position, vectors, metrics=("kl",), path="replay")
    where = prompt.tolist(), tuple(position.tolist())
    same_x = recording.at("blocks.2.hook_resid_post", *where)
    assert torch.equal(same_x, recording.at(SITE, prompt, position))
    for name, given in (("2.resid_post", list(vectors)), ("blocks.2.hook_resid_post", vectors.cpu().numpy())):
        found = measure(recording, name, *where, given, metrics="kl", path="replay")
        assert torch.equal(found["kl"], expected["kl"])
        assert torch.equal(intervened_logits(recording, name, *where, given), intervened_logits(*_at(device)))
    one = measure_joint(
        recording, where[0], Put("2.resid_post", range(len(prompt)), where[1], list(vectors)), metrics="kl"
    )
    assert_same_effect(
        one["kl"], measure(recording, SITE, prompt, position, vectors, horizon="last")["kl"], SHUFFLED_CHUNKS
    )
    read = torch.stack([position, position], 1)
    listed = measure(recording, SITE, *where, vectors, horizon=[[p, -1] for p in where[1]])
    assert torch.equal(listed["kl"][:, 0], measure(recording, SITE, *where, vectors, horizon=read)["kl"][:, 0])


def _at(device):
    recording, *rest = setting(device)
    return recording, SITE, *rest


def test_single_prompt_or_position_is_broadcast(device):
    recording = recorded("llama", SITE, device=device)
    for prompt, position in ((0, [3, 5, 7]), ([0, 1, 2], 4), (1, 2)):
        n = max(np.size(prompt), np.size(position))
        rows_of = [torch.tensor(np.broadcast_to(x, (n,)).copy()) for x in (prompt, position)]
        x = recording.at(SITE, prompt, position)
        assert torch.equal(x, recording.at(SITE, *rows_of))
        assert torch.equal(
            measure(recording, SITE, prompt, position, 2 * x)["kl"], measure(recording, SITE, *rows_of, 2 * x)["kl"]
        )


@pytest.mark.parametrize(
    ("prompt", "position", "message"),
    [
        ([0, 0], [1.0, 2.0], "positions of torch.float32; expected whole numbers"),
        (torch.tensor([True]), [1], "of a mask its mask.nonzero"),
        ([0, 1], [[1, 2], [3]], "positions are no table of whole numbers"),
        ("0", [1], "prompts are no table of whole numbers"),
        ([0, 1], [1], "one of each a row"),
        ([0], [99], "position 99 lies outside prompt 0"),
    ],
)
def test_invalid_prompts_and_positions_raise(prompt, position, message, device):
    recording = recorded("llama", SITE, device=device)
    with pytest.raises(SiteError, match=message):
        recording.at(SITE, prompt, position)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e39])
def test_nonfinite_vectors_raise_before_anything_runs(value, device, monkeypatch):
    """1e39 is finite as given and infinite in the model's float32."""
    recording, prompt, position, vectors = setting(device)
    wide = vectors.double()
    wide[4, 1] = value
    monkeypatch.setattr("interventions.effects.in_chunks", lambda *_: pytest.fail("ran"))
    for run in (
        lambda: measure(recording, SITE, prompt, position, wide),
        lambda: intervened_logits(recording, SITE, prompt, position, wide),
        lambda: measure_joint(recording, prompt, [Put(SITE, torch.arange(len(prompt)), position, wide)]),
    ):
        with pytest.raises(EditError, match=r"1 of 19 vectors at 2\.resid_post.*in row 4;.*nonfinite='count'"):
            run()


@PATHS
@pytest.mark.parametrize("batch_rows", [1, 7])
def test_row_order_and_chunk_size_change_nothing(path, batch_rows, device):
    recording, prompt, position, vectors = setting(device)
    expected = measure(recording, SITE, prompt, position, vectors, metrics=METRICS_OF_ALL_KINDS, path=path)
    order = torch.randperm(len(prompt), generator=torch.Generator().manual_seed(0))
    prompt, position, vectors = prompt[order], position[order], vectors[order.to(device)]
    seen = []
    found = measure(
        *(recording, SITE, prompt, position, vectors),
        metrics=METRICS_OF_ALL_KINDS,
        path=path,
        batch_rows=batch_rows,
        progress=seen.append,
    )
    same_values(found, part(expected, order))
    logits, clean = (
        all_alone("llama", recording.model.hf, prompts(), SITE, prompt, position, v) for v in (vectors, None)
    )
    assert_same_effect(found["kl"], exact_kl(clean, logits), TOLERANCE)
    assert sum(seen) == len(prompt) and max(seen) <= batch_rows and len(seen) == -(-len(prompt) // batch_rows)


def test_logits_of_a_large_vocabulary_are_exact_in_parts(device):
    """The vocabulary is so large that a chunk's logits are computed in several parts, and edits of one token span parts."""
    vocab = 49152
    recording = record(tiny_model("llama", device, vocab=vocab), prompts(vocab=vocab), [SITE])
    prompt, position = rows([(0, 12)] * 300 + [(0, p) for p in range(24)] * 20 + [(1, 9)] * 11)
    order = torch.randperm(len(prompt), generator=torch.Generator().manual_seed(0))
    prompt, position = prompt[order], position[order]
    vectors = edited(recording, SITE, prompt, position)
    own = torch.randint(vocab, (len(prompt), 2), generator=torch.Generator().manual_seed(1))
    asked = ("kl", "top1_changed", "clean_entropy", Probability([7, 8]), LogitDifference(own, 7))
    effects = measure(recording, SITE, prompt, position, vectors, metrics=asked, batch_rows=2000)
    for some in (slice(0, 50), slice(600, 720)):  # a part holds 2²⁵ / 49152 = 682 rows, clean ones among them
        clean = recording.model.hf.lm_head(recording.final_hidden[prompt[some].to(device), position[some].to(device)])
        logits = intervened_logits(recording, SITE, prompt[some], position[some], vectors[some])
        assert_same_effect(effects["kl"][some], exact_kl(clean, logits), SHUFFLED_CHUNKS, rounding=1e-4)
        changed = (logits.argmax(-1) != clean.argmax(-1)).cpu()
        assert (effects["top1_changed"][some] != changed).sum() <= 1  # a tie may fall either way
        log_p = clean.double().log_softmax(-1).cpu()
        assert torch.allclose(effects["clean_entropy"][some].double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-4)
        for kind, x in (("clean_", clean.cpu()), ("", logits.cpu())):
            p, difference = x.softmax(-1)[:, [7, 8]].sum(-1), x.gather(-1, own[some]).mean(-1) - x[:, 7]
            assert torch.allclose(effects[f"{kind}probability"][some], p, atol=2 * TOLERANCE)
            assert torch.allclose(effects[f"{kind}logit_difference"][some], difference, atol=2 * TOLERANCE)


@PATHS
def test_repeated_calls_are_bitwise_equal(path, device):
    recording, prompt, position, vectors = setting(device)
    first, second = (
        measure(recording, SITE, prompt, position, vectors, metrics=tuple(METRICS), path=path) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in METRICS)
    assert path == "hooks" or first.delta == second.delta


def test_vectors_may_have_another_dtype(device):
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


@pytest.mark.parametrize(
    ("site", "path"), [(Site(0, "resid_pre"), "replay"), (SITE, "replay"), (SITE, "hooks"), (LAST, "replay")], ids=str
)
def test_effects_are_measured_against_a_reference_run(site, path, device):
    """KL between two hooked runs: two references at each token, or one for all."""
    recording, prompt, position, vectors = setting(device, site=site)
    hf = recording.model.hf
    slow = all_alone("llama", hf, prompts(), site, prompt, position, vectors)
    plain = measure(recording, site, prompt, position, vectors, path=path)["kl"]
    others = edited(recording, site, prompt[::2], position[::2], seed=9), 2 * noise(1, device, seed=9)
    for other, index in zip(others, (torch.arange(len(prompt)) // 2, torch.zeros_like(prompt)), strict=True):
        reference = Reference(other, index)
        found = measure(
            recording, site, prompt, position, vectors, reference=reference, path=path, metrics=("kl", "js")
        )
        clean = all_alone("llama", hf, prompts(), site, prompt, position, other[index.to(device)])
        assert_same_effect(found["kl"], exact_kl(clean, slow), TOLERANCE)
        assert torch.allclose(found["js"].to(device), js_divergence(clean, slow), atol=1e-4)
        assert (found["kl"] - plain).abs().max() > 0.01


def test_reference_works_in_a_prompt_of_one_token(device):
    recording = record(tiny_model("llama", device), [[0]], [SITE])
    zero, index = torch.zeros(4, dtype=torch.long), torch.tensor([1, 0, 1, 0])
    vectors, other = noise(4, device, seed=3), noise(2, device, seed=4)
    found = measure(recording, SITE, zero, zero, vectors, reference=Reference(other, index), path="replay")["kl"]
    clean, slow = (
        all_alone("llama", recording.model.hf, [[0]], SITE, zero, zero, v) for v in (other[index.to(device)], vectors)
    )
    assert_same_effect(found, exact_kl(clean, slow), TOLERANCE)


# Several positions at once


@PATHS
def test_position_order_and_padding_change_nothing(path, device):
    recording, prompt, position, vectors = setting_of_several(device)
    options = {"metrics": METRICS_OF_ALL_KINDS, "path": path}
    expected = measure(recording, MIDDLE, prompt, position, vectors, horizon="last", **options)
    order = torch.stack([torch.randperm(3, generator=torch.Generator().manual_seed(i)) for i in range(len(prompt))])
    shuffled = vectors.gather(1, order[..., None].expand(-1, -1, D_MODEL).to(device))
    found = measure(recording, MIDDLE, prompt, position.gather(1, order), shuffled, horizon="last", **options)
    assert all(torch.equal(found[name], expected[name]) for name in expected.values)
    wide = torch.nn.functional.pad(position, (1, 2), value=-1)
    padded = torch.nn.functional.pad(vectors, (0, 0, 1, 2), value=torch.nan)  # what pads is never read
    found = measure(recording, MIDDLE, prompt, wide, padded, horizon="last", **options)
    assert all(torch.equal(found[name], expected[name]) for name in expected.values)


@PATHS
def test_one_position_in_a_column_equals_a_vector_of_positions(path, device):
    recording, prompt, position, vectors = setting(device, site=MIDDLE)
    options = {"metrics": METRICS_OF_ALL_KINDS, "path": path, "horizon": 5}
    expected = measure(recording, MIDDLE, prompt, position, vectors, **options)
    same_values(measure(recording, MIDDLE, prompt, position[:, None], vectors[:, None], **options), expected)


@pytest.mark.parametrize("several_edits", [False, True])
@pytest.mark.parametrize("path", ["grouped", "masked", "hooks"])
def test_a_nonfinite_vector_affects_its_own_row_only(path, several_edits, device):
    """Other rows of its group or chunk keep their values; in longer branches, later positions are nonfinite."""
    model = wrap(fresh("llama", device))
    if path == "masked":
        model.replay_attention = path
    recording = record(model, prompts(), [MIDDLE])
    prompt, position = several() if several_edits else rows()
    vectors = edited(recording, MIDDLE, prompt, position)
    options = {
        "metrics": ("kl", "js", "kl_direct"),
        "horizon": 24 if several_edits else 1,
        "path": "hooks" if path == "hooks" else "replay",
        "nonfinite": "count",
    }
    expected = measure(recording, MIDDLE, prompt, position, vectors, **options)
    broken = ((1, 4), (10, 20)) if several_edits else ((3, 12), (8, 9))  # row and position
    for (row, place), value in zip(broken, (torch.nan, torch.inf), strict=True):
        vectors[row, position[row] == place if several_edits else slice(None)] = value
    bad = torch.zeros(len(prompt), dtype=torch.bool).index_fill(0, torch.tensor([row for row, _ in broken]), True)
    effects = measure(recording, MIDDLE, prompt, position, vectors, **options)
    for name in ("kl", "js", "kl_direct"):
        same(effects[name][~bad], expected[name][~bad])
    for row, place in broken:  # from the broken edit on nothing is left
        reached = effects.position[row] >= place
        assert not effects["kl"][row, reached].isfinite().any() if several_edits else not effects["kl"][row].isfinite()
    assert effects.n_nonfinite == int(((effects.position >= 0) & ~effects["kl"].isfinite()).sum()) > 0


# Horizons


@pytest.mark.parametrize(
    ("site", "path"), [(MIDDLE, "replay"), (MIDDLE, "hooks"), (LAST, "replay"), (Site(0, "mlp_out"), "replay")], ids=str
)
def test_first_and_last_horizon_columns_equal_horizon_1_and_last(site, path, device):
    """Column 0 equals horizon 1; the last valid column equals `last` and lies at the prompt's last token."""
    recording, prompt, position, vectors = setting(device, site=site)
    some, options = (recording, site, prompt, position, vectors), {"metrics": METRICS_OF_ALL_KINDS, "path": path}
    one, whole, last = (measure(*some, **options, horizon=horizon) for horizon in (1, 24, "last"))
    length = torch.tensor(LENGTHS)[prompt]
    where = position[:, None] + torch.arange(24)
    assert torch.equal(whole.position, torch.where(where < length[:, None], where, -1))
    assert torch.equal(one.position, position) and torch.equal(last.position, length - 1)
    for value in whole.values.values():
        beyond = value[whole.position < 0]
        if beyond.is_floating_point():
            assert beyond.isnan().all()
        else:  # truth values, and token ids
            assert (beyond == (False if beyond.dtype == torch.bool else -1)).all()
    row = torch.arange(len(prompt))
    same_values(part(whole, (row, 0)), one)
    same_values(part(whole, (row, length - 1 - position)), last)
    assert (last["kl"] - one["kl"])[length - 1 > position].abs().min() > 1e-6


def part(effects, index):
    """Some of the rows, or one read of each."""
    values = {name: value[index] for name, value in effects.values.items()}
    return replace(effects, values=values, position=effects.position[index])


@pytest.mark.parametrize(
    ("horizon", "batch_rows", "path"), [(5, 40, "replay"), ("last", 2, "replay"), (5, 9, "hooks")], ids=str
)
def test_chunk_size_changes_nothing_with_horizons(horizon, batch_rows, path, device):
    """Results differ only by rounding. A chunk holds as many tokens as asked for, or a single longer branch."""
    recording, prompt, position, vectors = setting_of_several(device, horizon=horizon)
    order = torch.randperm(len(prompt), generator=torch.Generator().manual_seed(0))
    prompt, position, vectors = prompt[order], position[order], vectors[order.to(device)]
    options = {"metrics": METRICS_OF_ALL_KINDS, "horizon": horizon, "path": path}
    expected = measure(recording, MIDDLE, prompt, position, vectors, **options)
    seen = []
    options |= {"batch_rows": batch_rows, "progress": seen.append}
    same_values(measure(recording, MIDDLE, prompt, position, vectors, **options), expected)
    assert sum(seen) == len(prompt) and len(seen) > 1
    found = measure(recording, MIDDLE, prompt, position, lambda rows: vectors[rows.to(device)], **options)
    same_values(found, expected)


@pytest.mark.parametrize(("horizon", "path"), [(5, "replay"), ("last", "hooks")], ids=str)
def test_later_positions_are_compared_with_the_reference_run(horizon, path, device):
    """Later tokens are compared with the reference's own run, not with the clean prompt."""
    recording, prompt, position, vectors = setting(device, site=MIDDLE)
    index = torch.arange(len(prompt)) // 2
    other = edited(recording, MIDDLE, prompt[::2], position[::2], seed=9)
    found = measure(
        *(recording, MIDDLE, prompt, position, vectors), reference=Reference(other, index), horizon=horizon, path=path
    )
    own = other[index.to(device)]
    hf = recording.model.hf
    clean, slow = (all_alone("llama", hf, prompts(), MIDDLE, prompt, position, v, horizon) for v in (own, vectors))
    assert_same_effect(found["kl"], exact_kl(clean, slow), TOLERANCE)
    plain = measure(recording, MIDDLE, prompt, position, vectors, horizon=horizon, path=path)
    assert (found["kl"] - plain["kl"]).abs().nan_to_num(0).max() > 0.01
    itself = Reference(vectors, torch.arange(len(prompt)))
    nothing = measure(recording, MIDDLE, prompt, position, vectors, reference=itself, horizon=horizon, path=path)
    assert nothing["kl"].nan_to_num(0).max() <= 1e-9


# Direct effects


def direct_alone(name, hf, tokens, site, moved, reference=None):
    """Logits of one prompt with `moved` added to the stream after its last block, by the model's own modules; reference:
    position and vector of an edit at `site` made first."""

    def put(hidden):
        hidden = hidden.clone()
        hidden[0, reference[0]] = reference[1]
        return hidden

    remove = changed_in(name, hf, site, put) if reference else lambda: None
    try:
        return forward_alone(name, hf, tokens, LAST, {q: lambda x, d=d: x + d for q, d in moved.items()})
    finally:
        remove()


def direct_kl(name, hf, recording, site, prompt, position, vectors, effects):
    """KL of the change carried straight to the end at each read position that was edited, 0 at others, nan beyond."""
    where = effects.position.view(len(prompt), -1)
    expected = torch.full(where.shape, torch.nan, dtype=torch.float64)
    for i, p in enumerate(prompt.tolist()):
        at = position[i].reshape(-1).tolist()
        new = vectors[i].view(len(at), -1)
        moved = {q: new[j] - recording.activations[site][p, q] for j, q in enumerate(at) if q >= 0}
        clean = forward_alone(name, hf, prompts()[p], None, {})
        carried = direct_alone(name, hf, prompts()[p], site, moved)
        kl = exact_kl(clean, carried)
        for j, q in enumerate(where[i].tolist()):
            if q >= 0:
                expected[i, j] = kl[q] if q in moved else 0.0
    return expected.view(effects.position.shape)


@pytest.mark.parametrize(("name", "point"), points_by_turns(*REPLAYED, *HOOKED, turn=2))
def test_direct_effect_is_added_to_the_final_residual_stream(name, point, device):
    turn, site = POINTS.index(point), Site(3, point)
    horizon = (1, 12, "last")[turn % 3]
    recording = record(tiny_model(name, device), prompts(), [site])
    prompt, position = rows() if horizon == 1 else several()
    keep = within(position, horizon)
    prompt, position = prompt[keep][::2], position[keep][::2]
    vectors = edited(recording, site, prompt, position)
    for path in ("auto", "hooks")[: 1 + (name == "gpt2")]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of full passes
            effects = measure(
                recording, site, prompt, position, vectors, metrics=("kl_direct", "kl"), horizon=horizon, path=path
            )
        expected = direct_kl(name, recording.model.hf, recording, site, prompt, position, vectors, effects)
        assert_same_effect(effects["kl_direct"], expected, TOLERANCE)
        assert effects["kl_direct"].nan_to_num(0).max() > 0.03


@pytest.mark.parametrize(
    ("site", "path"), [(MIDDLE, "replay"), (MIDDLE, "hooks"), (LAST, "replay"), (LAST, "hooks")], ids=str
)
def test_direct_effect_starts_from_the_reference(site, path, device):
    """The change is relative to the reference's vector and is added to the reference's own residual stream."""
    recording, prompt, position, vectors = setting(device, site=site)
    index = torch.arange(len(prompt)) // 2
    other = edited(recording, site, prompt[::2], position[::2], seed=9)
    hf, own = recording.model.hf, other[index.to(device)]
    for horizon in (1, 5):
        found = measure(
            *(recording, site, prompt, position, vectors),
            metrics=("kl_direct",),
            reference=Reference(other, index),
            horizon=horizon,
            path=path,
        )["kl_direct"]
        for i, (p, q) in enumerate(zip(prompt.tolist(), position.tolist(), strict=True)):
            clean = forward_alone("llama", hf, prompts()[p], site, {q: own[i]})[q]
            moved = direct_alone("llama", hf, prompts()[p], site, {q: vectors[i] - own[i]}, (q, own[i]))[q]
            first, rest = found[i].view(-1)[:1], found[i].view(-1)[1:]
            assert_same_effect(first, exact_kl(clean, moved)[None], TOLERANCE)
            assert (rest.nan_to_num(0) == 0).all()


# Metrics of tokens


@pytest.mark.parametrize(("horizon", "path"), [(1, "replay"), (5, "replay"), ("last", "replay"), (5, "hooks")], ids=str)
def test_token_metrics_equal_those_of_full_forward_logits(horizon, path, device):
    """Rows are out of order and of several prompts, each with its own tokens."""
    recording, prompt, position, vectors = setting(device, site=MIDDLE)
    order = torch.randperm(len(prompt), generator=torch.Generator().manual_seed(0))
    prompt, position, vectors = prompt[order], position[order], vectors[order.to(device)]
    n = len(prompt)
    stream = torch.Generator().manual_seed(1)  # of each row two tokens, neither of which stands on the other side
    own = torch.stack([6 + torch.randperm(VOCAB - 6, generator=stream)[:2] for _ in range(n)])
    asked = (
        LogitDifference(own, [4, 5]),
        LogitDifference(3, own[:, :1], name="other"),
        Probability(own),
        Rank(own.tolist()),
        Rank([7], name="rank_of_7"),
    )
    effects = measure(recording, MIDDLE, prompt, position, vectors, metrics=asked, horizon=horizon, path=path)
    assert list(effects.values) == [f"{kind}{m.name}" for m in asked for kind in ("", "clean_")]
    hf = recording.model.hf
    for kind, given in (("", vectors), ("clean_", None)):
        x = all_alone("llama", hf, prompts(), MIDDLE, prompt, position, given, horizon).double().cpu()
        at = own if x.ndim == 2 else own[:, None].expand(-1, x.shape[1], -1)
        mine, p = x.gather(-1, at), x.softmax(-1)
        expected = {
            "logit_difference": mine.mean(-1) - x[..., [4, 5]].mean(-1),
            "other": x[..., 3] - mine[..., 0],
            "probability": p.gather(-1, at).sum(-1),
            "rank": (x > mine.amax(-1, keepdim=True)).sum(-1),
            "rank_of_7": (x > x[..., 7:8]).sum(-1),
        }
        there = ~x[..., 0].isnan()
        for name, value in expected.items():
            found = effects[f"{kind}{name}"]
            assert torch.equal(~found.isnan(), there)
            gap = (found.double() - value)[there].abs()
            assert (gap <= 1).all() and (gap > 0).float().mean() < 0.1 if "rank" in name else gap.max() <= 2 * TOLERANCE


UNKNOWN_METRIC = (
    "unknown metric 'kll'; known: kl, js, top1_changed, top1_drop, top1, clean_top1, clean_entropy, kl_direct, "
    "metrics of tokens"
)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ((Rank(3), Rank(4)), MechdiagError, "two metrics have the name 'rank'"),
        ((Rank(3, name="x"), Rank(3, name="clean_x")), MechdiagError, "two metrics have the name 'clean_x'"),
        (("kl", "kll"), MechdiagError, UNKNOWN_METRIC),
        (("kl", "kl"), MechdiagError, "two metrics have the name 'kl'"),
        ((Rank(VOCAB),), EditError, f"rank: a token id lies outside the vocabulary of {VOCAB}"),
        ((Probability([3, -1]),), EditError, "probability: a token id lies outside"),
        ((Rank([[3], [4]]),), EditError, r"rank: token ids of shape \[2, 1\]; expected .* \[19, token\]"),
    ],
    ids=str,
)
def test_invalid_metrics_raise(asked, error, message, device):
    recording, prompt, position, vectors = setting(device)
    with pytest.raises(error, match=message):
        measure(recording, SITE, prompt, position, vectors, metrics=asked)


# Memory


def scarce(limit, monkeypatch):
    """Memory for `limit` tokens at once; the list of how many were tried."""
    real, asked = module.replayed, []

    def replayed(recording, branches, *rest, **options):
        asked.append(branches.n_tokens)
        if branches.n_tokens > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(recording, branches, *rest, **options)

    monkeypatch.setattr(module, "replayed", replayed)
    return asked


@pytest.mark.parametrize("limit", [1, 9])
def test_a_chunk_that_runs_out_of_memory_is_halved(limit, monkeypatch, device):
    recording, prompt, position, vectors = setting(device)
    expected = measure(recording, SITE, prompt, position, vectors)["kl"]  # checked once: no trial below
    asked, seen = scarce(limit, monkeypatch), []
    with pytest.warns(UserWarning, match="out of memory: chunks halved"):
        effects = measure(recording, SITE, prompt, position, vectors, batch_rows=16, progress=seen.append)
    assert effects.halvings == {1: 4, 9: 1}[limit] and max(asked) == 16
    assert sum(seen) == len(prompt) and max(seen) <= limit
    same(effects["kl"], expected)


def test_chunks_are_halved_down_to_one_branch(monkeypatch, device):
    recording, prompt, position, vectors = setting(device)
    some, options = (recording, SITE, prompt, position, vectors), {"metrics": METRICS_OF_ALL_KINDS, "horizon": 5}
    expected = measure(*some, **options)
    asked, seen = scarce(5, monkeypatch), []
    with pytest.warns(UserWarning, match="out of memory: chunks halved"):
        effects = measure(*some, **options, batch_rows=64, progress=seen.append)
    assert sum(seen) == len(prompt) and max(asked) > 5 >= min(asked) and effects.halvings >= 2
    same_values(effects, expected)
    monkeypatch.undo()
    scarce(4, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):  # a branch of five tokens fits in no chunk
        measure(*some, **options)


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (RuntimeError("boom: shapes do not match"), 1),
        (torch.OutOfMemoryError("CUDA out of memory."), 4),
        (MemoryError(), 4),
    ],
    ids=["another error", "no memory for one row", "no host memory for one row"],
)
def test_other_errors_and_lack_of_memory_for_one_row_raise(error, calls, monkeypatch, device):
    recording, prompt, position, vectors = setting(device)
    measure(recording, SITE, prompt, position, vectors)
    seen = []

    def fail(*_, **__):
        seen.append(1)
        raise error

    monkeypatch.setattr(module, "replayed", fail)
    with pytest.raises(type(error)):
        measure(recording, SITE, prompt, position, vectors, batch_rows=8)
    assert len(seen) == calls


# What goes wrong


@PATHS
@pytest.mark.parametrize(
    "metrics", [("kl",), ("js",), ("top1_changed",), ("top1",), (Rank([5]),), ("clean_top1", "top1_changed")], ids=str
)
def test_nonfinite_rows_are_counted_for_every_metric(metrics, path, device):
    """A nan row has no valid flag, id or rank; positions beyond a prompt's end are not counted."""
    recording, prompt, position, vectors = setting(device)
    vectors[[3, 8]] = torch.nan
    how = {"metrics": metrics, "path": path, "horizon": 2}
    with pytest.raises(
        EditError, match=r"2 of 19 vectors at 2\.resid_post are not finite in float32, the first in row 3;"
    ):
        measure(recording, SITE, prompt, position, vectors, **how)
    effects = measure(recording, SITE, prompt, position, vectors, nonfinite="count", **how)
    read = effects.position >= 0
    expected = read.clone()
    expected[[3, 8]] = False
    assert torch.equal(effects.finite, expected) and effects.n_nonfinite == int(read[[3, 8]].sum()) > 0
    for name, values in effects.values.items():
        if name in ("top1", "rank"):
            assert torch.equal(~values.isnan() & (values != -1), expected)


def test_delta_is_nan_where_nothing_was_compared(device):
    recording, prompt, position, vectors = setting(device)
    assert np.isnan(measure(recording, SITE, prompt, position, vectors, path="hooks").delta)
    assert 0 < measure(recording, SITE, prompt, position, vectors).delta <= TOLERANCE


def test_only_the_requested_metrics_are_returned(device):
    recording, prompt, position, vectors = setting(device)
    effects = measure(recording, SITE, prompt, position, vectors, metrics=("js", "top1_changed"))
    assert list(effects.values) == ["js", "top1_changed"]
    assert effects["js"].dtype == torch.float32 and effects["top1_changed"].dtype == torch.bool
    assert effects["js"].device.type == "cpu" and effects["js"].shape == prompt.shape


def test_no_rows_raise(device):
    recording = record(tiny_model("llama", device), prompts(), [SITE])
    none = torch.zeros(0, dtype=torch.long)
    with pytest.raises(SiteError, match="no rows"):
        measure(recording, SITE, none, none, torch.zeros(0, D_MODEL, device=device))


def test_a_site_inside_a_block_needs_the_blocks_input_recorded(device):
    """Replay starts there."""
    recording, prompt, position, vectors = setting(device)
    assert measure(recording, Site(4, "resid_pre"), prompt, position, vectors).path == "replay"  # needs no recording
    with pytest.raises(SiteError, match=r"site 4.resid_pre was not recorded"):
        measure(recording, Site(4, "attn_out"), prompt, position, vectors)
    kept = record(recording.model, prompts(), [Site(4, "mlp_out")])
    assert measure(kept, Site(4, "attn_out"), prompt, position, vectors).path == "replay"


@pytest.mark.parametrize("name", ["replay ", ""])
def test_an_unknown_path_raises(name, device):
    recording, prompt, position, vectors = setting(device)
    with pytest.raises(MechdiagError, match="path"):
        measure(recording, SITE, prompt, position, vectors, path=name)


@pytest.mark.parametrize("batch_rows", [-1, 0])
def test_batch_rows_below_1_never_loop_forever(batch_rows, device):
    """Such values raise or mean the default."""
    recording, prompt, position, vectors = setting(device)
    expected = measure(recording, SITE, prompt, position, vectors)["kl"]
    try:
        same(measure(recording, SITE, prompt, position, vectors, batch_rows=batch_rows)["kl"], expected)
    except MechdiagError as error:
        assert "batch_rows" in str(error)


def test_replay_is_refused_when_it_is_off_by_more_than_rounding(monkeypatch, device):
    """Hidden states that are off by 1e-3 of their size are rejected."""
    recording, prompt, position, vectors = setting(device)
    recording = record(wrap(fresh("llama", device)), prompts(), [SITE])
    real = module.replayed

    def nearly(*args, **options):
        found = real(*args, **options)
        return found._replace(hidden=found.hidden + 1e-3 * found.hidden.roll(1, -1))

    for place in (module, trust):
        monkeypatch.setattr(place, "replayed", nearly)
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


def test_errors_share_a_base_class():
    assert issubclass(ModelError, MechdiagError) and issubclass(MechdiagError, ValueError)


def test_replay_is_checked_with_finite_rows(device):
    """Even if many of the longest rows are nan, finite ones are used for the check."""
    recording = record(wrap(fresh("llama", device)), prompts(), [SITE])
    position = torch.cat([torch.full((70,), 23), torch.arange(3, 9)])
    prompt = torch.zeros_like(position)
    vectors = recording.at(SITE, prompt, position) + 0.5
    vectors[:70] = torch.nan
    effects = measure(recording, SITE, prompt, position, vectors, nonfinite="count")
    assert (effects.path, effects.n_nonfinite) == ("replay", 70)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma2", "phi", "granite"]
)  # plain, tied, soft-capped, bias, scaled
def test_logit_differences_compute_only_the_needed_logits(name, device, monkeypatch):
    recording, prompt, position, vectors = setting(device, name)
    widths = []

    def seen(*args):
        widths.append((found := unembed(*args)).shape)
        return found

    monkeypatch.setattr(module, "unembed", seen)
    own = torch.stack([torch.randperm(VOCAB)[:2] for _ in prompt]) % 7 + 6
    found = measure(recording, SITE, prompt, position, vectors, metrics=(LogitDifference(own[:, :1], [3, 90]),))
    assert found.path == "replay" and {width for _, width in widths} <= set(range(3, 10))
    x = all_alone(name, recording.model.hf, prompts(), SITE, prompt, position, vectors).double().cpu()
    expected = x.gather(-1, own[:, :1])[:, 0] - x[:, [3, 90]].mean(-1)
    assert torch.allclose(found["logit_difference"].double(), expected, atol=2 * TOLERANCE)


class _Mixing(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * (1 + found.logits.amax(-1, keepdim=True) ** 2)
        return found


class _Louder(torch.nn.Linear):
    def forward(self, input):
        return super().forward(input) * 3


@pytest.mark.parametrize("how", ["hook", "subclass", "forward", "mixing"])
def test_unembeddings_with_extra_steps_compute_all_logits(how):
    hf = fresh("llama")
    head = hf.lm_head
    if how == "hook":
        head.register_forward_hook(lambda _, __, out: out * out.amax(-1, keepdim=True))
    elif how == "forward":
        head.forward = lambda x: 3 * torch.nn.functional.linear(x, head.weight)
    else:
        whose = hf if how == "mixing" else head
        whose.__class__ = _Mixing if how == "mixing" else _Louder
    recording = record(hf, prompts(), [SITE])
    prompt, position = rows()
    vectors = edited(recording, SITE, prompt, position)
    asked = {"metrics": (LogitDifference(3, [90, 7]),)}
    found, slow = (measure(recording, SITE, prompt, position, vectors, path=p, **asked) for p in ("replay", "hooks"))
    assert torch.allclose(found["logit_difference"], slow["logit_difference"], rtol=1e-4, atol=1e-3)
