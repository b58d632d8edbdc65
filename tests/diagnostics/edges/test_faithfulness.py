"""Circuits against full forward passes with every other head set, and on a model whose circuit is known."""

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch

from diagnostics.edges.circuits import CIRCUIT, NOTHING, faithfulness
from diagnostics.edges.result import EdgePatching
from diagnostics.edges.run import edge_patching
from diagnostics.pairs.pair import Pair, Pairs
from diagnostics.pairs.read import pairs_from
from interventions import Site
from interventions.errors import ResultError
from tests import induction, inside
from tests.diagnostics.edges.test_edge_patching import poolable, with_large_effects
from tests.paths import Paths
from tests.tiny import N_LAYERS, TOLERANCE, VOCAB, changed_in, tiny_model


def some_pairs(name: str, n: int) -> Pairs:
    hf, generator, found = tiny_model(name), torch.Generator().manual_seed(11), []
    for _ in range(n):
        clean, other = torch.randint(1, VOCAB, (2, 6), generator=generator).tolist()
        corrupt = [*clean[:2], other[2], *clean[3:]]
        change = torch.subtract(*(hf(input_ids=torch.tensor([t])).logits[0, -1] for t in (clean, corrupt)))
        found.append(Pair(tuple(clean), tuple(corrupt), int(change.argmax()), int(change.argmin())))
    return Pairs(tuple(found), np.zeros(n), np.zeros(n))


@pytest.mark.parametrize("ablate", ["corrupt", "mean"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_circuits_match_full_forward_passes(name, ablate):
    pairs, hf = some_pairs(name, 3), tiny_model(name)
    circuit = [(1, 2), (4, 0), (3, "mlp_out")]
    sites = [Site(i, "z", head=h) for i in range(N_LAYERS) for h in range(4)] + [
        Site(i, "mlp_out") for i in range(N_LAYERS)
    ]
    own = [Site(1, "z", head=2), Site(4, "z", head=0), Site(3, "mlp_out")]
    result: Any = faithfulness(hf, pairs, circuit, scope=("z", "mlp_out"), ablate=ablate, n_random=2, path="replay")
    runs = [Paths(name, hf, list(p.clean), list(p.corrupt)) for p in pairs]

    def value(i: int, site: Site) -> torch.Tensor:
        which = [i] if ablate == "corrupt" else range(len(pairs))
        if site.point == "mlp_out":
            return torch.stack([runs[j].other[site] for j in which]).mean(0)
        whole = torch.stack([runs[j].z[site.layer] for j in which]).mean(0)
        return whole[:, (site.head or 0) * inside.D_HEAD : ((site.head or 0) + 1) * inside.D_HEAD]

    for i, pair in enumerate(pairs):
        for edit, number in (("keep", CIRCUIT), ("remove", CIRCUIT), ("keep", NOTHING)):
            ablated = own if edit == "remove" else [s for s in sites if number == NOTHING or s not in own]
            edits: dict[Site, torch.Tensor] = {}
            for site in ablated:
                if site.point == "mlp_out":
                    edits[site] = value(i, site)
            heads = {(s.layer, s.head): value(i, s) for s in ablated if s.point == "z"}
            logits = _forward(name, hf, list(pair.clean), edits, heads)
            line = result.frame.query("pair == @i and edit == @edit and circuit == @number")
            expected = float(logits[-1, pair.right] - logits[-1, pair.wrong])
            assert float(line["m"].iloc[0]) == pytest.approx(expected, abs=TOLERANCE)
    assert len(result.frame) == 3 * (1 + 2 * 3)


def _forward(name, hf, tokens, mlps, heads):
    with ExitStack() as stack:
        for site, values in mlps.items():
            stack.callback(changed_in(name, hf, site, lambda x, values=values: values.view(x.shape)))
        for layer in {layer for layer, _ in heads}:

            def put(z, layer=layer):
                z = z.clone()
                for (at, head), values in heads.items():
                    if at == layer:
                        z[:, head * inside.D_HEAD : (head + 1) * inside.D_HEAD] = values
                return z

            stack.enter_context(inside.seen(name, hf, Site(layer, "z"), put))
        return hf(input_ids=torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("kind", induction.KINDS)
def test_only_the_complete_planted_circuit_is_faithful(kind):
    given = induction.pairs(n=2, lengths=(8,), kinds=(kind,))
    made = tuple(Pair(tuple(p.clean), tuple(p.corrupt), p.right, p.wrong) for p in given)
    pairs, hf, circuit = Pairs(made, np.zeros(2), np.zeros(2)), induction.induction_model(), induction.CIRCUITS[kind]

    def shares(some, **more):
        return {g["edit"]: g["share"].value for g in faithfulness(hf, pairs, sorted(some), n_random=0, **more).groups}

    found = shares(circuit)
    assert found["keep"] == pytest.approx(1, abs=2 * induction.INERT) and found["remove"] == pytest.approx(
        1, abs=2 * induction.INERT
    )
    for lost in circuit:
        rest = set(induction.HEADS) - {lost}
        assert shares(rest)["keep"] == pytest.approx(0, abs=2 * induction.INERT)
    others = set(induction.HEADS) - circuit
    assert shares(others)["remove"] == pytest.approx(0, abs=2 * induction.INERT)
    result: Any = faithfulness(hf, pairs, sorted(circuit), n_random=60, seed=1)
    for g in result.groups:
        some: Any = (
            result.frame.query("edit == @g['edit'] and circuit > 0").groupby("circuit")[["effect", "total"]].sum()
        )
        null = (some["effect"] / some["total"]).to_numpy()
        assert np.minimum(abs(null), abs(null - 1)).max() < 2 * induction.INERT  # a circuit has all or nothing
        chance = {1: 1 / 8, 2: {"keep": 1 / 28, "remove": 1 / 28 + 12 / 28}[g["edit"]]}[len(circuit)]
        assert abs((null > 0.5).mean() - chance) < 4 * np.sqrt(chance * (1 - chance) / 60)
        assert g["p"] == pytest.approx((1 + (null > g["share"].value - 0.5).sum()) / 61)
    assert result.figures()


def test_edges_that_beat_their_controls_make_a_circuit():
    pairs, hf = poolable("query", 12), induction.induction_model()
    edges = edge_patching(hf, pairs, senders=("embedding", "z"), receivers=("q", "k", "v", "logits"))
    result: Any = faithfulness(hf, pairs, edges, n_random=0)
    assert result.provenance["circuit"] == ["1.z.2"]
    assert result.groups[0]["share"].value == pytest.approx(1, abs=2 * induction.INERT)
    assert result.frame.equals(faithfulness(hf, pairs, [(1, 2)], n_random=0).frame)


def test_shared_keys_and_out_of_scope_edges_are_counted():
    hf, pairs = tiny_model("llama"), some_pairs("llama", 12)
    ends: Any = {"senders": ["0.z.1", "1.mlp_out"], "receivers": ["3.k.1", "2.q.3", "logits"]}
    measured = edge_patching(hf, pairs, directions=("noise",), floor=0.0, **ends)
    edges = with_large_effects(measured, [("0.z.1", "3.k.1"), ("1.mlp_out", "logits")])
    assert set(edges.edges[edges.edges["beats"]]["receiver"]) == {"3.k.1", "logits"}
    result: Any = faithfulness(hf, pairs, edges, n_random=0)
    assert result.provenance["circuit"] == ["0.z.1", "3.z.2", "3.z.3"] and result.provenance["circuit_left_out"] == 1
    assert "components of edges outside the scope" in result.table()
    both: Any = faithfulness(hf, pairs, edges, scope=("z", "mlp_out"), n_random=0)
    assert both.provenance["circuit"] == ["0.z.1", "1.mlp_out", "3.z.2", "3.z.3"]
    frame: Any = edges.frame
    untested = EdgePatching(frame[frame["control"] == 0], edges.tokens, edges.provenance)
    nothing = with_large_effects(measured, [("1.mlp_out", "logits")])
    for model, given, said in (
        (hf, untested, "controls=1 or more"),
        (tiny_model("gpt2"), edges, "other weights"),
        (hf, nothing, "1.mlp_out would be, in another scope"),
    ):
        with pytest.raises(ResultError, match=said):
            faithfulness(model, pairs, given)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"circuit": [(1, 2)], "ablate": "zero"}, "known: corrupt, mean"),
        ({"circuit": [(1, "mlp_out")]}, "1.mlp_out is in the circuit but not in the scope"),
        ({"circuit": [(1, 2)], "scope": ()}, "scope"),
        ({"circuit": [(1, 2)], "scope": ("q",)}, "known: z, mlp_out"),
        ({"circuit": [(1, 2)], "n_random": -1}, "-1 random circuits"),
        ({"circuit": []}, "nothing named"),
    ],
)
def test_invalid_arguments_raise(settings, said):
    circuit = settings.pop("circuit")
    with pytest.raises(ResultError, match=said):
        faithfulness(tiny_model("llama"), some_pairs("llama", 2), circuit, **settings)


def test_mean_ablation_drops_pairs_alone_in_their_pool():
    pairs = some_pairs("llama", 3)
    long = Pair((5, 6, 7, 8), (5, 9, 7, 8), pairs[0].right, pairs[0].wrong)
    mixed = Pairs((*pairs.pairs, long), np.zeros(4), np.zeros(4))
    result: Any = faithfulness(
        tiny_model("llama"), pairs_from(tiny_model("llama"), mixed, floor=0.0), [(1, 2)], ablate="mean", n_random=0
    )
    assert set(result.frame["pair"]) == {0, 1, 2}
    assert result.provenance["pairs_dropped"] == {"no other pair in its pool to average over": 1}
