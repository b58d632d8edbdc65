"""Worths of coalitions against full forward passes, and on a model whose circuit is known."""

from typing import Any

import numpy as np
import pytest
import torch

from diagnostics.coalitions.run import shapley
from diagnostics.pairs.pair import Pair, Pairs
from interventions import Site
from interventions.errors import EditError, ResultError
from tests import induction, inside
from tests.diagnostics.coalitions.test_indices import by_merging, by_orders
from tests.tiny import TOLERANCE, VOCAB, tiny_model

COMPONENTS = ((1, 2), (3, 0), "3.q.1", Site(4, "neurons"))


def some_pairs(name: str, n: int = 2) -> Pairs:
    hf, generator, found = tiny_model(name), torch.Generator().manual_seed(5), []
    for _ in range(n):
        clean, other = torch.randint(1, VOCAB, (2, 7), generator=generator).tolist()
        corrupt = [*clean[:2], other[2], *clean[3:5], other[5], clean[6]]
        change = torch.subtract(*(hf(input_ids=torch.tensor([t])).logits[0, -1] for t in (clean, corrupt)))
        found.append(Pair(tuple(clean), tuple(corrupt), int(change.argmax()), int(change.argmin())))
    return Pairs(tuple(found), np.zeros(n), np.zeros(n))


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_values_match_full_forward_passes(direction, positions):
    hf, pairs = tiny_model("llama"), some_pairs("llama")
    sites = [Site(1, "z", head=2), Site(3, "q", head=1), Site(3, "z", head=0), Site(4, "neurons")]
    frame: Any = shapley(hf, pairs, COMPONENTS, direction=direction, positions=positions, path="replay").frame
    for number, pair in enumerate(pairs):
        base, source = (pair.corrupt, pair.clean) if direction == "denoise" else (pair.clean, pair.corrupt)
        at = range(2, 7) if positions == "all" else [6]
        v = []
        for s in range(16):
            edits = []
            for i, site in enumerate(sites):
                whole = inside.clean("llama", hf, list(source), site.whole)
                head = 0 if site.head is None else site.head
                width = whole.shape[1] if site.head is None else inside.D_HEAD
                edits += [(site, p, whole[p, head * width : (head + 1) * width]) for p in at if s >> i & 1]
            logits = inside.forward("llama", hf, list(base), edits)[-1]
            v.append(float(logits[pair.right] - logits[pair.wrong]))
        worth = (np.array(v) - v[0]) * (1 if direction == "denoise" else -1)
        lines: Any = frame[frame["pair"] == number]
        values = lines[lines["partner"] == ""].set_index("component")["value"]
        assert values[[str(s) for s in sites]].to_numpy() == pytest.approx(by_orders(worth), abs=TOLERANCE)
        both = lines.query("component == '1.z.2' and partner == '3.z.0'")["value"].item()
        assert both == pytest.approx(by_merging(worth, 0, 2), abs=4 * TOLERANCE)
        assert lines["all"].iloc[0] == pytest.approx(worth[-1], abs=TOLERANCE)


def test_heads_in_series_split_the_value_and_interact():
    given = induction.pairs(n=2, lengths=(8,), kinds=("source",))
    pairs = Pairs(
        tuple(Pair(tuple(p.clean), tuple(p.corrupt), p.right, p.wrong) for p in given), np.zeros(2), np.zeros(2)
    )
    hf = induction.induction_model()
    result: Any = shapley(hf, pairs, [induction.PREVIOUS, induction.INDUCTION, induction.TWINS[0]])
    matrix = result.matrix().to_numpy()
    # Either alone restores all of it: half each, and together one less than apart.
    assert matrix == pytest.approx(np.array([[0.5, 0, -1], [0, 0, 0], [-1, 0, 0.5]]), abs=5 * induction.INERT)
    assert result.together.value == pytest.approx(1, abs=induction.INERT)
    assert result.figures() and "Interactions" in result.table()


def test_sampled_intervals_cover_most_exact_values():
    hf, pairs = tiny_model("gpt2"), some_pairs("gpt2", 3)
    heads = [(layer, head) for layer in (1, 3) for head in range(4)]
    every: Any = shapley(hf, pairs, heads).frame
    exact: Any = every[every["partner"] == ""].reset_index(drop=True)
    sampled: Any = shapley(hf, pairs, heads, orders=31, seed=3).frame
    assert (exact[["pair", "component"]] == sampled[["pair", "component"]]).all(axis=None)
    inside_ = (exact["value"] >= sampled["low"] - 1e-5) & (exact["value"] <= sampled["high"] + 1e-5)
    assert inside_.mean() > 0.8 and (sampled["high"] > sampled["low"]).any()
    sums = [f.groupby("pair")["value"].sum().to_numpy() for f in (exact, sampled)]
    assert sums[0] == pytest.approx(sums[1], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"components": [(1, 2)]}, ResultError, "1 component; expected 2"),
        ({"components": "z"}, ResultError, "24 components have 16,777,216 coalitions"),
        ({"components": [(1, 2), Site(1, "attn_out")]}, EditError, "without effect"),
        ({"components": [(1, 2), (1, 3)], "positions": "each"}, ResultError, "known: last, all"),
        ({"components": [(1, 2), (1, 3)], "direction": "up"}, ResultError, "known: denoise, noise"),
        ({"components": [(1, 2), (1, 3)], "orders": 2}, ResultError, "4 or more"),
        ({"components": [(1, 2, "pattern"), (1, 3)]}, ResultError, "expected one of"),
    ],
)
def test_invalid_arguments_raise(settings, error, said):
    with pytest.raises(error, match=said):
        shapley(tiny_model("llama"), some_pairs("llama"), settings.pop("components"), **settings)
