"""The hand-built induction circuit is what `tests.induction` says, by plain forward passes."""

import itertools

import pytest
import torch

from tests.induction import CELLS, CIRCUITS, EDGES, HEADS, INERT, KINDS, LOGIT, Slow, forward, induction_model, pairs


@pytest.fixture(scope="module")
def hf():
    return induction_model()


def of_kind(kind: str):
    return pairs(1, (6, 10), (kind,))


def test_completes_every_clean_prompt_and_no_corrupt_one(hf):
    low = {"source": 0.0, "answer": -LOGIT, "query": -LOGIT}
    for pair in pairs(12):
        assert len(pair.clean) == len(pair.corrupt)
        assert sum(a != b for a, b in zip(pair.clean, pair.corrupt, strict=True)) == 1
        clean, corrupt = forward(hf, pair.clean), forward(hf, pair.corrupt)
        others = clean.logits[-1].sort().values
        assert clean.logits[-1].argmax() == pair.right and others[-1] - others[-2] > 0.9 * LOGIT
        assert abs(clean.metric(pair) - LOGIT) < INERT * LOGIT
        assert abs(corrupt.metric(pair) - low[pair.kind]) < INERT * LOGIT


def test_distractors_differ_between_the_prompts(hf):
    for pair in pairs(1):
        clean, corrupt = forward(hf, pair.clean), forward(hf, pair.corrupt)
        moved = (clean.z[1] - corrupt.z[1])[-1].view(len(HEADS) // 2, -1).norm(dim=1)
        assert (moved > 0.9).sum() >= 2, "the twin moves as far as the induction head"


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_true_z_cells_have_an_effect(hf, kind, direction):
    for pair in of_kind(kind):
        slow = Slow(hf, pair, direction)
        true = {(layer, head, pair.roles[role]) for layer, head, role in CELLS[kind]}
        for cell in ((*head, p) for head in HEADS for p in range(len(pair.clean))):
            assert abs(slow.cell(*cell) - (cell in true)) < INERT, cell


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_true_edges_have_an_effect(hf, kind, direction):
    pair = of_kind(kind)[1]
    slow = Slow(hf, pair, direction)
    true = {(*edge,): pair.roles[role] for *edge, role in EDGES[kind]}
    for edge in slow.edges():
        assert abs(slow.edge(*edge) - (edge in true)) < INERT, edge
    for edge, at in true.items():
        for position in range(len(pair.clean)):
            assert abs(slow.edge(*edge, position=position) - (position == at)) < INERT, (edge, position)


@pytest.mark.parametrize("kind", KINDS)
def test_only_sets_that_contain_the_circuit_are_faithful(hf, kind):
    slow = Slow(hf, of_kind(kind)[0], "noise")
    for n in range(len(HEADS) + 1):
        for kept in list(itertools.combinations(HEADS, n))[:: 1 if n in (1, 2) else 6]:
            damage = slow.joint((*head, None) for head in HEADS if head not in kept)
            assert abs(1 - damage - (CIRCUITS[kind] <= set(kept))) < INERT, kept


def test_float32_agrees_with_float64():
    hf, pair = induction_model(torch.float64), of_kind("source")[0]
    single = forward(induction_model(), pair.clean).logits
    torch.testing.assert_close(single.double(), forward(hf, pair.clean).logits, rtol=0, atol=1e-4)
