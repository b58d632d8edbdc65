"""Shared options of commands: validated before loading the model, and with the meaning that their help states."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
import torch

from diagnostics.commands.inputs import PatchingOptions, ReplayPath, SplicePath, short_names
from interventions import Site, effects, spliced, wrap
from interventions.errors import MechdiagError, ModelError, ResultError, SiteError, TextError
from interventions.models import loading
from interventions.texts import prompts as reading
from tests.tiny import VOCAB, fresh, tiny_model, tokenizer

FILES = ("x.parquet", "x.json", "tokens.npy")


@dataclass(frozen=True)
class Options(PatchingOptions):
    """A command with one more option."""

    pairs: int = 4
    """of something"""


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model or reading a text fails the test."""
    for module, name in ((loading, "load_model"), (reading, "load_texts")):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Options; `tests/scripts/test_commands.py` has those that every command refuses


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizon": "0"}, "horizon '0'; expected a number of positions, 1 or more, or 'last'"),
        ({"horizon": "-1"}, "horizon '-1'"),
        ({"horizon": "1.5"}, "horizon '1.5'"),
        ({"horizon": "²"}, "horizon '²'"),
        ({"horizon": ""}, "horizon ''"),
        ({"sites": ("attn_out", "3.resid_psot")}, "no site 'resid_psot' in block 3; known: resid_pre, attn_out"),
        ({"sites": ("-3.resid_post",)}, "no site '-3.resid_post'"),
    ],
)
def test_horizons_and_sites_are_checked_without_a_model(no_model, tmp_path, settings, message):
    with pytest.raises(SiteError, match=message) as raised:
        Options(out=tmp_path / "new", **settings).check(FILES)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "new").exists()  # and before anything is written


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_found_without_a_model(no_model, tmp_path):
    with pytest.raises(ModelError, match="torch sees 0 CUDA devices; use --device cpu"):
        Options(out=tmp_path, device="cuda").check(FILES)


def test_valid_options_pass_and_make_the_folder(no_model, tmp_path):
    sites = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "2.mlp_out", "blocks.15.hook_resid_post")
    settings = {"path": "hooks", "null_model": "random", "dtype": "bfloat16", "device": "cpu", "horizon": "last"}
    Options(out=tmp_path / "a" / "b", sites=sites, **settings).check(FILES)
    assert (tmp_path / "a" / "b").is_dir()
    assert contents(tmp_path) == {}


# The folder


@pytest.mark.parametrize("name", FILES)
def test_folder_of_another_run_is_refused_and_unchanged(no_model, tmp_path, name):
    (tmp_path / name).write_bytes(b"another run")
    with pytest.raises(ResultError, match=rf"holds another run \({name}\); name another folder or pass --overwrite"):
        Options(out=tmp_path).check(FILES)
    Options(out=tmp_path, overwrite=True).check(FILES)
    assert contents(tmp_path) == {name: b"another run"}  # replaced only once the new one is written


def test_folder_with_a_run_json_is_accepted(no_model, tmp_path):
    """`Units` compares run.json: the same run goes on, another is refused."""
    for name in FILES:
        (tmp_path / name).write_bytes(b"finished")
    (tmp_path / "run.json").write_text(json.dumps({"seed": 0}))
    Options(out=tmp_path).check(FILES)
    assert set(contents(tmp_path)) == {*FILES, "run.json"}


def test_other_files_in_the_folder_are_ignored(no_model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    Options(out=tmp_path).check(FILES)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


# Meaning


@pytest.mark.parametrize(("given", "horizon"), [("1", 1), ("3", 3), ("128", 128), ("last", "last")])
def test_positions(given, horizon):
    found = Options(out=Path("x"), horizon=given).positions()
    assert found == horizon and type(found) is type(horizon)


@pytest.mark.parametrize(
    ("layers", "sites", "expected"),
    [
        ((), ("resid_post",), ["0.resid_post", "4.resid_post"]),
        ((2,), ("resid_post",), ["2.resid_post"]),
        ((5, 1), ("resid_post",), ["5.resid_post", "1.resid_post"]),
        ((1, 2), ("attn_out", "mlp_out"), ["1.attn_out", "2.attn_out", "1.mlp_out", "2.mlp_out"]),
        ((), ("attn_out", "3.resid_mid"), ["0.attn_out", "4.attn_out", "3.resid_mid"]),
        ((), ("3.resid_mid",), ["3.resid_mid"]),
        ((1,), ("3.resid_mid", "blocks.2.hook_resid_pre"), ["3.resid_mid", "2.resid_pre"]),
        ((1,), ("3.resid_mid", "attn_out"), ["3.resid_mid", "1.attn_out"]),
    ],
)
def test_points_expand_to_every_layer_and_sites_stay_single(layers, sites, expected):
    found = Options(out=Path("x"), layers=layers, sites=sites).places([0, 4])
    assert all(isinstance(site, Site) for site in found)
    assert [str(site) for site in found] == expected


def test_path_options_match_the_engine():
    assert (get_args(ReplayPath), get_args(SplicePath)) == (effects.PATHS, spliced.PATHS)


def test_common_arguments_of_diagnostics():
    plain = Options(out=Path("x"))
    assert plain.common() == {
        "context": "in_place",
        "horizon": 1,
        "sink_filter": 10.0,
        "seed": 0,
        "null_seeds": 0,
        "batch_rows": None,
        "path": "auto",
        "folder": Path("x"),
        "overwrite": False,
    }
    asked = {"context": "both", "horizon": "4", "sink_filter": 0.0, "seed": 3, "batch_rows": 9, "path": "hooks"}
    found = Options(out=Path("y"), null_model="random", null_seeds=5, overwrite=True, **asked).common()
    expected = {**asked, "horizon": 4, "sink_filter": None, "null_seeds": 5, "folder": Path("y"), "overwrite": True}
    assert found == expected
    assert Options(out=Path("x"), null_seeds=5).common()["null_seeds"] == 0  # without --null-model random


def test_short_names_are_distinct():
    assert short_names(("results/saes/15/cosine", "zoo/7/standard/")) == ["cosine", "standard"]
    assert short_names(("a/15/standard", "a/7/standard", "a/7/cosine")) == ["15/standard", "7/standard", "7/cosine"]
    assert short_names(("standard", "/x/standard")) == ["standard", "x/standard"]
    assert short_names(("hf:owner/name/layer",)) == ["layer"]
    assert short_names((".",)) == ["."]
    with pytest.raises(MechdiagError, match="a/b is given twice"):
        short_names(("a/b", "./a/b/"))


# Loading


TEXT = "\n\n".join(" ".join(f"w{3 + (i * j) % (VOCAB - 3)}" for j in range(1, 12)) for i in range(1, 9))


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A file of 8 paragraphs; a tiny model is loaded under any name, and the calls are recorded."""
    asked = []

    def load(name, **how):
        asked.append((name, how))
        return wrap(fresh("llama"), tokenizer(), name)

    monkeypatch.setattr(loading, "load_model", load)
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt"), asked


def test_model_and_prompts_follow_the_options(text, tmp_path):
    path, asked = text
    settings = {"prompts": path, "model": "mine", "dtype": "bfloat16", "device": "cpu"}
    model, prompts = Options(out=tmp_path, n_prompts=5, max_length=7, seed=2, **settings).load()
    assert asked == [("mine", {"dtype": "bfloat16", "device": "cpu", "trust_remote_code": False})]
    assert model.name == "mine"
    assert [len(ids) for ids in prompts.tokens] == [7] * 5
    assert (prompts.provenance["max_length"], prompts.provenance["name"]) == (7, "text.txt")
    _, again = Options(out=tmp_path, n_prompts=5, max_length=7, seed=2, **settings).load()
    _, other = Options(out=tmp_path, n_prompts=5, max_length=7, seed=3, **settings).load()
    assert again.tokens == prompts.tokens != other.tokens
    (tmp_path / "second.txt").write_text("w5 w6 w7\n\nw8 w9 w10")
    _, second = Options(out=tmp_path, n_prompts=2, **settings).load(str(tmp_path / "second.txt"))
    assert second.provenance["name"] == "second.txt"


def test_unreadable_text_is_refused_before_the_model_is_loaded(text, tmp_path):
    with pytest.raises(TextError, match=r"no file 'nowhere\.txt'"):
        Options(out=tmp_path, prompts="nowhere.txt").load()
    assert text[1] == []


def test_too_few_prompts_or_no_tokenizer_raise(text, tmp_path, monkeypatch):
    with pytest.raises(TextError, match="texts left as prompts: 8 of 8; expected 100"):
        Options(out=tmp_path, prompts=text[0]).load()
    with pytest.raises(TextError, match="no chat template"):
        Options(out=tmp_path, prompts=text[0], n_prompts=4, chat_template=True).load()
    monkeypatch.setattr(loading, "load_model", lambda name, **_: wrap(tiny_model("llama"), name=name))
    with pytest.raises(MechdiagError, match="model 'mine' has no tokenizer, so it cannot read text; name another"):
        Options(out=tmp_path, prompts=text[0], n_prompts=4, model="mine").load()
