"""Planted latents: TPP at its maximum, SCR 1; random latents: 0."""

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.probe_perturbation import work as work_module
from diagnostics.probe_perturbation.splits import attributes_of, crossed_split
from diagnostics.probe_perturbation.summary import EVERY, groups_of
from diagnostics.probe_perturbation.work import CELLS, SCR, TEXTS, TPP, _Work
from diagnostics.sparse_probing.pooling import PooledTexts
from interventions import ResultError, Site
from interventions.texts.labelled import Labelled
from interventions.texts.prompts import Prompts
from sae_models.dictionaries import Dictionary
from sae_models.sae import SAE
from sae_models.scores import Inner
from sae_models.selectors import ReLU

SITE, D = Site(1), 12
SETTINGS = {"ks": [1, 2], "seeds": 2, "test_share": 0.3, "inverse_penalty": 1.0, "seed": 0}


def planted(labels: list[str], signal: np.ndarray, size: float) -> tuple[_Work, PooledTexts]:
    """Texts of two tokens whose activations are `signal`, then coordinates ± `size` that say nothing; latents are coordinates of either sign."""
    n, width = signal.shape
    stream = np.random.default_rng(0)
    x = np.concatenate([signal, size * stream.choice([-1.0, 1], size=(n, D - width))], axis=1)
    texts = [f"text {i}" for i in range(n)]
    prompts = Prompts([[1, 2]] * n, [[False, False]] * n, texts)
    tokens = torch.from_numpy(np.repeat(x[:, None], 2, axis=1).reshape(-1, D))
    pooled = PooledTexts(prompts, labels, texts, {SITE: tokens}, None)
    rows = torch.cat([torch.eye(D, dtype=torch.float64), -torch.eye(D, dtype=torch.float64)])
    zeros = torch.zeros(2 * D, dtype=torch.float64)
    sae = SAE(Inner(rows.clone(), zeros), ReLU(), rows, zeros[:D], hook_name=SITE.hook_name).requires_grad_(False)
    return _Work(pooled, Dictionary("1/planted", SITE, sae.W_dec, sae=sae), "made", SETTINGS), pooled


def groups(work: _Work, protocol: str) -> list[dict]:
    keys = {"protocol": protocol, "sae": "1/planted", "dataset": "made"}
    cells = pd.DataFrame(work.cells).assign(layer=1, point="resid_post", **keys)[list(CELLS)]
    return list(groups_of(cells, work.texts().assign(**keys)[list(TEXTS)]))


def test_planted_classes_give_the_largest_tpp():
    """Latent i is class i: ablating it leaves probe i at chance, a fall of ½, and no other probe loses anything."""
    labels = ["a", "b", "c"] * 40
    work, _ = planted(labels, np.eye(3)[[ord(label) - ord("a") for label in labels]], 0.5)
    for number in range(2):
        list(work.perturbation(number))
    found = {(g["kind"], g["k"]): g for g in groups(work, TPP) if g["ablated"] == EVERY}
    assert found["selected", 1]["intended"].value == pytest.approx(0.5, abs=0.02)
    assert found["selected", 1]["collateral"].value == pytest.approx(0, abs=0.02)
    assert found["selected", 1]["tpp"].value == pytest.approx(0.5, abs=0.03)
    assert abs(found["random", 1]["tpp"].value) < 0.05
    assert found["selected", 1]["before"] == 1 and found["direction", 0]["tpp"].value > 0.3
    assert found["random", 1]["dose"] <= found["selected", 1]["dose"] + 1e-9


def test_tpp_and_its_interval_by_hand():
    """TPP of the cells' accuracies, weighted by texts, is TPP of the table of texts; its interval is the jackknife over texts."""
    labels = ["a", "b", "c"] * 30
    signal = np.eye(3)[[ord(label) - ord("a") for label in labels]] + np.random.default_rng(1).normal(size=(90, 3))
    work, _ = planted(labels, signal, 0.5)
    for number in range(2):
        list(work.perturbation(number))
    cells = (
        pd.DataFrame(work.cells)
        .query("kind == 'selected' and k == 2")
        .assign(fall=lambda t: (t.before - t.after) * t.n_test)
    )
    sums = cells.groupby(["ablated", "probe"])[["fall", "n_test"]].sum()
    fall = (sums["fall"] / sums["n_test"]).unstack().to_numpy()
    by_hand = np.mean([fall[i, i] - np.delete(fall[i], i).mean() for i in range(3)])
    [own] = [g for g in groups(work, TPP) if (g["kind"], g["k"], g["ablated"]) == ("selected", 2, EVERY)]
    assert own["tpp"].value == pytest.approx(by_hand)
    texts = work.texts().query("kind == 'selected' and k == 2")

    def without(text):
        some = texts[texts["text"] != text].groupby(["ablated", "probe"])[["fell", "n"]].sum()
        left = (some["fell"] / some["n"]).unstack().to_numpy()
        return np.mean([left[i, i] - np.delete(left[i], i).mean() for i in range(3)])

    values = np.array([without(text) for text in texts["text"].unique()])
    se = np.sqrt((len(values) - 1) / len(values) * ((values - values.mean()) ** 2).sum())
    assert own["tpp"].se == pytest.approx(se)


def test_planted_attributes_give_scr_of_one(monkeypatch):
    """The biased probe reads b, which is larger, more than a. Without b's latents it tells a as well as an unbiased probe; without
    latents that say nothing, at the same dose, it does not."""
    monkeypatch.setattr(work_module, "dose_matched", lambda *_: torch.tensor([5, D + 5]))
    labels = [f"{a}/{b}" for a in "mn" for b in "pq"] * 60
    a, b = (np.array([label.split("/")[i] in ("n", "q") for label in labels]) for i in (0, 1))
    signal = np.stack([2.0 * a - 1, 3 * (2.0 * b - 1)], axis=1) + 0.7 * np.random.default_rng(1).normal(size=(240, 2))
    work, pooled = planted(labels, signal, 3)
    attributes = attributes_of(Labelled(pooled.prompts.texts, labels, "made", "", "", ""))
    assert attributes == (("m", "n"), ("p", "q"))
    for number in range(2):
        list(work.removal(number, attributes))
    found = {(g["kind"], g["k"]): g for g in groups(work, SCR) if g["ablated"] == "p/q"}
    own = found["selected", 2]
    assert own["before"] < 0.9 < own["oracle"] and own["scr"].value == pytest.approx(1, abs=0.1)
    assert own["scr"].value == pytest.approx((own["after"] - own["before"]) / (own["oracle"] - own["before"]))
    assert own["scr"].kind == "bounded" and own["scr"].low < 1 < own["scr"].high + 0.1
    assert abs(found["random", 2]["scr"].value) < 0.15


def test_splits_are_balanced_and_keep_groups_together():
    labels = [f"{a}/{b}" for a in "mn" for b in "pq"] * 12
    texts = [f"text {i}" for i in range(48)]
    groups = [f"{label}{i // 8}" for i, label in enumerate(labels)]
    usable = np.arange(48) != 5
    split = crossed_split(texts, labels, groups, usable, (("m", "n"), ("p", "q")), 0.3, 0)
    for side in (split.train, split.test):
        kinds = [labels[i] for i in side]
        assert len({kinds.count(label) for label in set(labels)}) == 1 and 5 not in side
    assert not {groups[i] for i in split.train} & {groups[i] for i in split.test}
    assert {labels[i] for i in split.agreeing} == {"m/p", "n/q"}


@pytest.mark.parametrize("labels", [["a", "b"], ["a/b", "a/c", "d/b"], ["a/b", "a/c", "d/e", "d/f"], ["a/b/c"] * 2])
def test_labels_that_are_not_two_by_two_raise(labels):
    with pytest.raises(ResultError, match="expected four"):
        attributes_of(Labelled([f"t{i}" for i in range(len(labels))], labels, "made", "", "", ""))
