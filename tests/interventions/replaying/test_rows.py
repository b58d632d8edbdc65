"""Rows as they are asked for: checked at the door, sorted, cut into branches, and read where they were asked to be."""

import functools

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interventions import EditError, Reference, Site, SiteError, intervened_logits, measure, record
from interventions.replaying.rows import Rows
from tests.tiny import D_MODEL, LENGTHS, prompts, tiny_model

SITE = Site(2, "resid_mid")


@functools.cache
def recording(device="cpu"):
    return record(tiny_model("llama", device), prompts(), [SITE])


@pytest.fixture
def unchecked_shapes():
    """As a user runs it: no shapes are checked at the door but by the engine itself."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def marked(prompt, position):
    """Vectors that say which row and which position they belong to."""
    several = position if position.ndim == 2 else position[:, None]
    vectors = torch.zeros(*several.shape, D_MODEL)
    vectors[..., 0], vectors[..., 1] = torch.arange(len(prompt))[:, None], several
    return vectors if position.ndim == 2 else vectors[:, 0]


@st.composite
def asked(draw):
    """Prompt, position `[row]` or `[row, edit]` padded anywhere, and a horizon within which all edits are read."""
    prompt = draw(st.lists(st.integers(0, len(LENGTHS) - 1), min_size=1, max_size=12))
    if draw(st.booleans()):
        position = torch.tensor([draw(st.integers(0, LENGTHS[p] - 1)) for p in prompt])
        return torch.tensor(prompt), position, draw(st.one_of(st.integers(1, 30), st.just("last")))
    n_edit = draw(st.integers(1, 4))
    rows, span = [], 1
    for p in prompt:
        used = draw(st.sets(st.integers(0, LENGTHS[p] - 1), min_size=1, max_size=n_edit))
        rows.append(draw(st.permutations([*used, *[-1] * (n_edit - len(used))])))
        span = max(span, max(used) - min(used) + 1)
    horizon = draw(st.one_of(st.integers(span, span + 20), st.just("last")))
    return torch.tensor(prompt), torch.tensor(rows), horizon


def edits_of(position, row):
    return sorted(q for q in position[row].reshape(-1).tolist() if q >= 0)


@given(asked(), st.data())
def test_branches_run_from_first_edit_to_last_measured_position(question, data):
    """Edited tokens carry their own vectors, in order."""
    prompt, position, horizon = question
    vectors = marked(prompt, position)
    rows = Rows(recording(), SITE, prompt, position, vectors, None, horizon)
    assert sorted(rows.order.tolist()) == list(range(len(prompt))) and len(rows) == len(prompt)
    n = data.draw(st.integers(1, len(prompt)))
    chunk = rows.order[data.draw(st.integers(0, len(prompt) - n)) :][:n]
    assert (np.diff(prompt.numpy()[chunk]) >= 0).all()
    branches = rows.branches(chunk)
    length = np.array(LENGTHS)[prompt.numpy()]
    for i, row in enumerate(chunk.tolist()):
        start = edits_of(position, row)[0]
        stop = length[row] if horizon == "last" else min(start + horizon, length[row])
        assert (branches.prompt[i], branches.start[i], branches.length[i]) == (prompt[row], start, stop - start)
        assert rows.furthest[row] == stop - 1
    expected = [(row, q) for row in chunk.tolist() for q in edits_of(position, row)]
    row_of, place = branches.row[branches.edited], branches.position[branches.edited]
    assert list(zip(chunk[row_of].tolist(), place.tolist(), strict=True)) == expected
    found = rows.edited(chunk)
    assert found[:, :2].long().tolist() == [list(pair) for pair in expected]
    called = Rows(recording(), SITE, prompt, position, lambda index: vectors[index], None, horizon)
    assert torch.equal(called.edited(chunk), found)
    clean = torch.stack([recording().activations[SITE][prompt[row], q] for row, q in expected])
    assert torch.equal(rows.clean_at_site(chunk), clean)
    assert rows.width == max(int(rows.branches(np.array([row])).length[0]) for row in range(len(prompt)))


@given(asked())
def test_measured_positions_are_tokens_of_their_branches(question):
    """Either every token of a branch is measured or its last; columns count from the first edited position."""
    prompt, position, horizon = question
    rows = Rows(recording(), SITE, prompt, position, marked(prompt, position), None, horizon)
    branches, reads = rows.branches(rows.order), rows.reads(rows.order)
    token = branches.first[reads.row] + reads.position - branches.start[reads.row]
    assert (branches.row[token] == reads.row).all() and (branches.position[token] == reads.position).all()
    assert (np.diff(reads.row) >= 0).all() and set(reads.row.tolist()) == set(range(len(prompt)))
    if horizon == "last":
        assert (reads.position == np.array(LENGTHS)[branches.prompt[reads.row]] - 1).all() and not reads.column.any()
        assert len(reads.row) == len(prompt)
    else:
        assert token.tolist() == list(range(branches.n_tokens))
        assert (reads.column == branches.place[token]).all() and reads.column.max() < horizon


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=20))
def test_equal_references_at_a_token_are_run_once(triples):
    prompt, position, index = torch.tensor(triples).T
    other = torch.randn(3, D_MODEL)
    rows = Rows(recording(), SITE, prompt, position, marked(prompt, position), Reference(other, index))
    distinct, which = rows.distinct_clean(rows.order)
    assert len(distinct) == len(set(triples))
    for row, kind in zip(rows.order.tolist(), which.tolist(), strict=True):
        assert triples[int(distinct[kind])] == triples[row]
    assert torch.equal(rows.reference_vectors(distinct), other[index[torch.from_numpy(distinct)]])
    assert torch.equal(rows.clean_at_site(rows.order), other[index[torch.from_numpy(rows.order)]])


# What is refused


def refused(error, message, prompt, position, vectors=None, **options):
    """By every function that takes rows."""
    prompt, position = torch.tensor(prompt), torch.tensor(position)
    vectors = torch.zeros(*position.shape, D_MODEL) if vectors is None else vectors
    for function in (measure, intervened_logits):
        with pytest.raises(error, match=message):
            function(recording(), SITE, prompt, position, vectors, **options)


NO_POSITION = "a row edits no position, or a negative one; expected positions, padded with −1"
NO_HORIZON = "horizon .*; expected a number of positions, 1 or more, or 'last'"
INVALID = [
    # prompts, positions, horizon, error
    ([0], [[3, 3]], "last", EditError, "row 0 edits position 3 twice; give each position once"),
    ([0, 0, 1], [[3, 4], [4, -1], [7, 7]], "last", EditError, "row 2 edits position 7 twice"),
    ([0, 0, 1], [[3, 4], [9, 2], [7, -1]], 3, EditError, "row 1 edits position 9"),
    ([0], [[3, 4]], 1, EditError, "edits position 4, but its effect is read at positions 3 to 3; use a longer horizon"),
    ([0], [[9, -1, 3]], 6, EditError, "row 0 edits position 9, but its effect is read at positions 3 to 8"),
    ([0, 0], [[3, 4], [-1, -1]], "last", SiteError, NO_POSITION),
    ([0], [[3, -7]], "last", SiteError, NO_POSITION),
    ([0, 1], [[3, -1], [4, 10]], "last", SiteError, "position 10 lies outside prompt 1, which has 10 tokens"),
    ([4], [[0, 1]], "last", SiteError, "position 1 lies outside prompt 4, which has 1 tokens"),
    ([5], [[3, 4]], "last", SiteError, "prompt 5 does not exist"),
    ([-1], [[3, 4]], "last", SiteError, "prompt"),
    ([0], [24], "last", SiteError, "position 24 lies outside prompt 0, which has 24 tokens"),
    ([0], [-1], "last", SiteError, "position -1"),
    *(([0], [3], horizon, SiteError, NO_HORIZON) for horizon in (0, -1, "first", 1.5, None)),
    ([0], [3], 10**9, SiteError, "horizon 1000000000, but the longest prompt has 24 tokens; expected no more"),
    ([0, 1], [3], "last", (SiteError, EditError), "expected one of each|for positions"),
    ([0], [[3, 4], [3, 4]], "last", (SiteError, EditError), "expected one of each|for positions"),
]


@pytest.mark.parametrize(("prompt", "position", "horizon", "error", "message"), INVALID, ids=str)
def test_invalid_rows_raise(prompt, position, horizon, error, message, unchecked_shapes):
    refused(error, message, prompt, position, horizon=horizon)
    if "lies outside" in message and isinstance(position[0], int):
        with pytest.raises(SiteError, match=message):
            recording().at(SITE, torch.tensor(prompt), torch.tensor(position))


@pytest.mark.parametrize(
    ("position", "shape"),
    [
        ([[3, 4]], (1, D_MODEL)),
        ([[3, 4]], (1, 3, D_MODEL)),
        ([[3, 4]], (2, 2, D_MODEL)),
        ([[3, 4]], (1, 2, D_MODEL - 1)),
        ([3], (1, 1, D_MODEL)),
        ([3], (1, 2 * D_MODEL)),
        ([3], (1, D_MODEL + 1)),
        ([3], (2, D_MODEL)),
        ([3], (D_MODEL,)),
    ],
    ids=str,
)
def test_vectors_of_the_wrong_shape_raise(position, shape, unchecked_shapes):
    refused(EditError, "edited vectors of shape", [0], position, torch.zeros(shape), horizon="last")
    if len(position) == shape[0]:
        with pytest.raises(EditError, match="edited vectors of shape"):
            given_a_function = lambda rows: torch.zeros(shape)  # noqa: E731
            measure(recording(), SITE, torch.tensor([0]), torch.tensor(position), given_a_function, horizon="last")


def test_invalid_references_raise():
    prompt, position = torch.tensor([0, 0]), torch.tensor([3, 4])
    other = torch.zeros(1, D_MODEL)
    for index, where in (
        (torch.zeros(3, dtype=torch.long), position),
        (torch.zeros(2, dtype=torch.long), position[:, None]),
    ):
        vectors = torch.zeros(*where.shape, D_MODEL)
        with pytest.raises(
            EditError, match=r"\d reference indices for positions .*; give one for each row, and one edited"
        ):
            measure(recording(), SITE, prompt, where, vectors, reference=Reference(other, index))
    for index in ([0, 1], [-1, 0]):
        with pytest.raises(EditError, match=r"reference indices from .* for 1 vectors"):
            reference = Reference(other, torch.tensor(index))
            measure(recording(), SITE, prompt, position, torch.zeros(2, D_MODEL), reference=reference)
    with pytest.raises(EditError, match="no list of positions to read"):
        reference, read = Reference(other, torch.tensor([0, 0])), torch.tensor([[4], [5]])
        measure(recording(), SITE, prompt, position, torch.zeros(2, D_MODEL), reference=reference, horizon=read)


def test_effects_at_given_positions_equal_a_long_horizon():
    """Positions may be in any order and padded with −1; those before the first edit raise."""
    prompt, position = torch.tensor([0, 3]), torch.tensor([3, 10])
    vectors = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(0))
    long = measure(recording(), SITE, prompt, position, vectors, horizon=12)["kl"]
    read = torch.tensor([[7, 3, -1], [21, 10, 12]])
    found = measure(recording(), SITE, prompt, position, vectors, horizon=read)
    expected = torch.stack([long[0, [4, 0, 0]], long[1, [11, 0, 2]]])
    assert torch.equal(found.position, read)
    assert found["kl"][0, 2].isnan()
    torch.testing.assert_close(found["kl"][read >= 0], expected[read >= 0], rtol=1e-4, atol=1e-6)
    for wrong in ([[2], [10]], [[24], [10]], [[-1], [10]], [[-2], [10]]):
        with pytest.raises(SiteError, match="reads positions"):
            measure(recording(), SITE, prompt, position, vectors, horizon=torch.tensor(wrong))
