"""Sparse probing from texts to tables on a tiny model: cells by hand, pooled estimates, resumed runs, files."""

import functools
import json
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.sampling.tokens import generator
from diagnostics.sparse_probing import work as sparse_probing
from diagnostics.sparse_probing.pooling import pooled_texts
from diagnostics.sparse_probing.probes import KINDS, task_probes
from diagnostics.sparse_probing.result import COLUMNS, SparseProbing
from diagnostics.sparse_probing.run import probe_saes
from diagnostics.sparse_probing.summary import MEAN, described
from diagnostics.sparse_probing.tasks import split_seed, tasks
from diagnostics.statistics.jackknife import jackknife
from interventions import ResultError, Site, SiteError, wrap
from interventions.texts.labelled import UNSPLIT, Labelled
from sae_models.architectures import build, named
from sae_models.errors import BelongingError
from sae_models.sae import SAE
from tests.tiny import D_MODEL, tiny_model, tokenizer

SITES = {"1/standard": Site(1), "4/cosine": Site(4)}
HOW = {"ks": (1, 4), "seeds": 2, "shuffles": 19, "refits": 4}


@functools.cache
def model():
    return wrap(tiny_model("llama"), tokenizer(), "owner/tiny")


def labelled(name: str, classes: str, n: int, per_group: int = 1) -> Labelled:
    """Texts in which words of their class are more frequent, in groups within a class; no word begins with the special w2."""
    drawn = np.random.default_rng(len(classes))
    words = [i for i in range(3, 97) if i // 10 != 2]
    texts, labels, groups = [], [], []
    for i in range(n * len(classes)):
        place = i % len(classes)
        own = drawn.choice([w for w in words if w % len(classes) == place], size=3)
        texts.append(" ".join(f"w{w}" for w in drawn.permutation([*own, *drawn.choice(words, size=4)])))
        labels.append(classes[place])
        groups.append(f"{classes[place]}{i // len(classes) // per_group}" if per_group > 1 else texts[-1])
    return Labelled(texts, labels, name, f"sha of {name}", "mine", "by hand", {}, groups)


SETS = [labelled("two", "ab", 20), labelled("three", "abc", 24, per_group=2)]


@functools.cache
def saes() -> dict[str, SAE]:
    found = {}
    for i, (name, site) in enumerate(SITES.items()):
        x = pooled_texts(model(), SETS[0], [site]).activations[site]
        sae = build(named(name.split("/")[1]), 40, 6, x, torch.Generator().manual_seed(i), hook_name=site.hook_name)
        sae.selector.threshold.fill_(0.2)
        found[name] = sae.requires_grad_(False)
    return found


@functools.cache
def result() -> SparseProbing:
    """A run that tests share and do not change."""
    return probe_saes(model(), SETS, saes(), **HOW)


def test_one_line_for_each_cell():
    frame = result().frame
    assert list(frame.columns) == list(COLUMNS)
    cells = ["sae", "dataset", "class", "seed", "kind", "k"]
    assert not frame.duplicated(cells).any() and frame.drop(columns="latents").notna().all().all()
    per_task = 2 * len(HOW["ks"]) + 3
    assert len(frame) == len(SITES) * (1 + 3) * HOW["seeds"] * per_task
    assert list(dict.fromkeys(frame["kind"])) == list(KINDS) and list(dict.fromkeys(frame["sae"])) == list(SITES)
    assert set(frame.loc[frame.dataset == "two", "class"]) == {"b"}
    assert set(frame["n_train"]) == {28, 32} and set(frame["n_test"]) == {12, 16}
    assert set(frame.loc[frame.dataset == "two", "n_groups"]) == {12}  # each text its own
    assert set(frame.loc[frame.dataset == "three", "n_groups"]) == {12}  # 4 of the class in pairs, 8 others in turn
    whole = ["seed", "k", "n_features", "n_train", "n_test", "n_groups"]
    assert (frame[whole].dtypes == np.int64).all()
    assert (result().held_out[["k", "text", "group", "n", "correct"]].dtypes == np.int64).all()
    assert result().names == list(SITES) and result().datasets == ["two", "three"]
    assert result().provenance["sites"] == ["1.resid_post", "4.resid_post"]


def test_cell_matches_step_by_step_computation():
    """Texts, mean latents, task and probe, computed one after the other."""
    name, site, some = "4/cosine", SITES["4/cosine"], SETS[1]
    pooled = pooled_texts(model(), some, [site])
    z, x = pooled.mean_latents(saes()[name], site), pooled.mean_activations(site).double().numpy()
    split = split_seed(0, 1)
    usable = np.ones(len(x), dtype=bool)
    task = tasks(pooled.prompts.texts, pooled.labels, usable, groups=pooled.groups, seed=split)["c"]
    stream = generator(split, "sparse probing", "three", "c")
    frame = result().frame.query("sae == @name and dataset == 'three' and `class` == 'c' and seed == 1")
    for (line, _), (_, row) in zip(task_probes(z, x, task, HOW["ks"], 1.0, stream), frame.iterrows(), strict=True):
        for key, value in line.items():
            assert row[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-6)), key


def test_pooled_estimates_are_jackknifes_over_groups():
    found, held = result(), result().held_out
    for dataset in found.datasets:
        rows = held.query("sae == '1/standard' and dataset == @dataset and kind == 'selected' and k == 4")
        n, correct, loss = (rows[c].to_numpy(float) for c in ("n", "correct", "cross_entropy"))
        group = rows["group"].to_numpy()
        (line,) = found.select(sae="1/standard", dataset=dataset, kind="selected", k=4)
        cells = found.frame.query("sae == '1/standard' and dataset == @dataset and kind == 'selected' and k == 4")
        assert line["accuracy"].value == pytest.approx(cells["accuracy"].mean())  # cells have as many texts each
        assert line["by_seed"]["accuracy"] == pytest.approx(cells.groupby("seed")["accuracy"].mean().tolist())
        assert line["auc"] == pytest.approx(cells["auc"].mean())
        for values, measure in ((correct, "accuracy"), (loss, "cross_entropy")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an interval from few groups
                slow = jackknife(lambda keep, v=values, n=n: v[keep].sum() / n[keep].sum(), len(n), group)
            got = line[measure]
            assert (got.value, got.low, got.high) == pytest.approx((slow.value, slow.low, slow.high))
            assert (got.n_rows, got.n_prompts) == (len(n), len(set(group))) == (slow.n_rows, slow.n_prompts)
    parts = [found.select(sae="1/standard", dataset=d, kind="best", k=1)[0]["cross_entropy"] for d in found.datasets]
    (both,) = found.select(sae="1/standard", dataset=MEAN, kind="best", k=1)
    assert both["cross_entropy"].value == pytest.approx(np.mean([p.value for p in parts]))
    # Errors of sets without a common text add; each part's (G − 1)/G is that of its own texts.
    assert both["cross_entropy"].se == pytest.approx(np.hypot(*(p.se for p in parts)) / 2, rel=0.05)


def test_differences_are_paired_by_text():
    found = result().difference("4/cosine", "1/standard", k=4)
    assert list(found) == ["two", "three", MEAN]
    for dataset in ("two", "three"):
        of = {g["sae"]: g["accuracy"].value for g in result().select(dataset=dataset, kind="selected", k=4)}
        assert found[dataset].value == pytest.approx(of["4/cosine"] - of["1/standard"])
        back = result().difference("1/standard", "4/cosine", k=4)[dataset]
        assert (back.value, back.se) == pytest.approx((-found[dataset].value, found[dataset].se))
    same = result().difference("4/cosine", "4/cosine")[MEAN]
    assert (same.value, same.se) == (0, 0)
    with pytest.raises(ResultError, match="no probe of '1/standard', kind 'selected', k 9"):
        result().difference("1/standard", "4/cosine", k=9)


def test_splits_with_refits_match_the_probes_of_the_table():
    """The first splits of `draws` are those of the table: accuracies of probes fitted one by one."""
    found = result()
    assert len(found.draws) == len(SITES) * len(SETS) * len(HOW["ks"]) * (HOW["shuffles"] + HOW["refits"])
    for key, part in found.draws.query("draw == 'split' and number < 2").groupby(["sae", "dataset", "k"]):
        cells = found.frame.query("kind == 'selected'").groupby(["sae", "dataset", "k", "seed"])["accuracy"].mean()
        assert part["accuracy"].tolist() == pytest.approx(cells[key].tolist())
    for group in found.select(kind="selected"):
        if group["dataset"] == MEAN:
            continue
        own = found.draws.query("sae == @group['sae'] and dataset == @group['dataset'] and k == @group['k']")
        splits, null = (own.query("draw == @kind")["accuracy"].to_numpy() for kind in ("split", "shuffled"))
        ratio = {"two": 12 / 28, "three": 16 / 32}[group["dataset"]]
        assert group["refits"].value == pytest.approx(splits.mean())
        assert group["refits"].se == pytest.approx(np.std(splits, ddof=1) * np.sqrt(1 / 4 + ratio), rel=0.1)
        reached = (null >= group["accuracy"].value - 1e-9).sum()
        assert group["shuffled"]["p"] == (1 + reached) / 20 and group["shuffled"]["mean"] == pytest.approx(null.mean())


def test_differences_with_refits_are_paired_by_split():
    found = result().difference("4/cosine", "1/standard", k=4, refits=True)
    splits = (
        result()
        .draws.query("draw == 'split' and k == 4")
        .set_index(["dataset", "sae", "number"])["accuracy"]
        .sort_index()
    )
    for dataset in ("two", "three"):
        apart = splits[dataset, "4/cosine"] - splits[dataset, "1/standard"]
        assert found[dataset].value == pytest.approx(apart.mean())
    assert found[MEAN].value == pytest.approx(np.mean([found[d].value for d in ("two", "three")]))
    same = result().difference("4/cosine", "4/cosine", refits=True)[MEAN]
    assert (same.value, same.se) == (0, 0)
    with pytest.raises(ResultError, match="no probe of 'other', k 4"):
        result().difference("1/standard", "other", k=4, refits=True)


def test_held_out_rows_index_the_stored_texts():
    held = result().held_out
    assert len(result().tokens) == sum(len(some.texts) for some in SETS)
    first = held[held["dataset"] == "two"]["text"]
    assert first.max() < len(SETS[0].texts) <= held[held["dataset"] == "three"]["text"].min()
    assert (held["correct"] <= held["n"]).all() and held["text"].max() < len(result().tokens)
    total = held.groupby(["sae", "dataset", "kind", "k"])["n"].sum()
    assert set(total["1/standard", "two"]) == {2 * 12} and set(total["1/standard", "three"]) == {2 * 3 * 16}
    texts = pooled_texts(model(), SETS[1], [Site(1)]).prompts.texts
    groups = {i: SETS[1].groups[SETS[1].texts.index(name)] for i, name in enumerate(texts, len(SETS[0].texts))}
    for row in held[held["dataset"] == "three"].itertuples():
        assert groups[row.group] == groups[row.text]


def test_an_interrupted_run_resumes(tmp_path, monkeypatch):
    passes, ticks = [], []
    watched = lambda m, some, *a, **k: passes.append(some.name) or pooled_texts(m, some, *a, **k)  # noqa: E731
    monkeypatch.setattr(sparse_probing, "pooled_texts", watched)

    def stop(n, total):
        ticks.append((n, total))
        if len(ticks) == 5:  # in the first unit of the second set
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe_saes(model(), SETS, saes(), folder=tmp_path, progress=stop, **HOW)
    assert passes == ["two", "three"] and {total for _, total in ticks} == {2 * 2 * (1 + 3)}
    again = probe_saes(model(), SETS, saes(), folder=tmp_path, **HOW)
    assert passes == ["two", "three", "three"]
    pd.testing.assert_frame_equal(again.frame, result().frame)
    pd.testing.assert_frame_equal(again.held_out, result().held_out)
    pd.testing.assert_frame_equal(again.draws, result().draws)
    probe_saes(model(), SETS, saes(), folder=tmp_path, **HOW)
    assert len(passes) == 3
    with pytest.raises(ResultError, match="holds units of another run"):
        probe_saes(model(), SETS, saes(), folder=tmp_path, **HOW | {"ks": (1,)})


def test_roundtrip(tmp_path):
    names = result().write(tmp_path)
    figures = (f"sparse_probing.{end}" for end in ("png", "svg", "pdf"))
    assert {p.name for p in tmp_path.iterdir()} == set(names) == {*SparseProbing.files(), *figures}
    back = SparseProbing.load(tmp_path)
    pd.testing.assert_frame_equal(back.frame, result().frame)
    pd.testing.assert_frame_equal(back.held_out, result().held_out)
    pd.testing.assert_frame_equal(back.draws, result().draws)
    assert back.tokens == result().tokens and back.table() == result().table()
    said = json.loads((tmp_path / "sparse_probing.json").read_text())
    assert said["provenance"]["texts"]["three"]["counts"] == {"a": 24, "b": 24, "c": 24}
    assert said["provenance"]["left_out"]["two, 1.resid_post"]["position 0"] == 40
    assert len(said["summary"]) == len(result().groups) == 2 * 3 * 7
    (tmp_path / SparseProbing.TABLES["held_out"]).unlink()
    with pytest.raises(ResultError, match=r"probed_texts\.parquet is missing"):
        SparseProbing.load(tmp_path)


def test_table_and_summary():
    said = result().table()
    for part in (
        "two: 40 texts\n",
        "three: 72 texts in groups (a 12, b 12, c 12)",
        "probe loss",
        "delete-one-group jackknife",
        "Selected latents over 4 splits, and beside 19 shuffles of the labels:\n",
    ):
        assert part in said, part
    summary = result().summary()
    assert len(summary) == len(result().groups)
    assert (summary["accuracy_seed_min"] <= summary["accuracy_seed_max"]).all()
    own = summary[summary["kind"] == "selected"]
    assert ((own["shuffled_p"] >= 1 / 20) & (own["shuffled_p"] <= 1)).all() and (own["shuffled_n"] == 19).all()


def test_invalid_arguments_raise_before_the_model_runs(monkeypatch):
    monkeypatch.setattr(sparse_probing, "pooled_texts", None)
    for how in ({"ks": ()}, {"ks": (0,)}, {"seeds": 0}, {"test_share": 1.0}, {"refits": 1}, {"inverse_penalty": 0.0}):
        with pytest.raises(ResultError, match="expected numbers of 1 or more"):
            probe_saes(model(), SETS, saes(), **how)
    with pytest.raises(ResultError, match="each once"):
        probe_saes(model(), [SETS[0], SETS[0]], saes())
    with pytest.raises(ResultError, match="a data set is called 'mean'"):
        probe_saes(model(), [replace(SETS[0], name="mean"), SETS[1]], saes())
    with pytest.raises(ResultError, match="is a set of directions"):
        probe_saes(model(), SETS, torch.ones(1, D_MODEL), site=Site(1))
    with pytest.raises((BelongingError, SiteError)):
        probe_saes(model(), SETS, saes(), site=Site(2))


def test_descriptions_of_data_sets():
    none = {"counts": {"a": 97, "b": 97}, "groups": {"a": 97, "b": 97}, "dropped": {"empty": 3}}
    assert described(none) == "194 texts"
    lost = none | {"groups": {"a": 10, "b": 30}, "dropped": {f"c: 3 {UNSPLIT}": 9, "beyond 97 of a class": 4}}
    assert described(lost) == "194 texts in groups (a 10, b 30; without c: 3 groups, fewer than 4)"
