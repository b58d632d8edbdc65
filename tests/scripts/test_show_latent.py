"""The command from its options to its pages, on a tiny model and small SAEs in folders."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from diagnostics.atlas import causal_atlas
from interventions import Site, load_model, record
from interventions.texts import load_texts, tokenize
from sae_models.architectures import build, named
from sae_models.loading import load_sae
from sae_models.saving import save_sae
from tests.tiny import prompts

SCRIPT = Path(__file__).parents[2] / "scripts" / "show_latent.py"
USUAL = ("--held-out", 0, "--effects", 12, "--top", 3, "--few", 1)


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("show_latent", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their own annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def saes(given) -> dict[str, Path]:
    """Folders of two SAEs of block 2."""
    found, model, site = {}, load_model(given / "model", device="cpu"), Site(2)
    x = record(model, prompts((20, 20, 20)), [site], keep_cache=False).activations[site].flatten(0, 1)
    for i, name in enumerate(("standard", "cosine")):
        generator = torch.Generator().manual_seed(i)
        sae = build(named(f"{name}:topk"), 40, 6, x, generator, model_name="model", hook_name=site.hook_name)
        found[name] = save_sae(sae, given / "saes" / name)
    return found


def errors(err: str) -> str:
    """What an error says, after what transformers says of a folder's weights."""
    return err.rstrip("\n").split("\n")[-1]


def test_several_latents_leave_a_page_each_and_an_index(run, saes, tmp_path):
    out = tmp_path / "cards"
    words = ("--sae", saes["cosine"], "--compare", saes["standard"], "--latents", 3, 7, "frequent:1", "--out", out)
    status, said, err = run(*words, *USUAL)
    assert status == 0, err
    names = {path.name for path in out.iterdir()}
    assert {"latent_3.html", "latent_7.html", "index.html"} <= names and len(names) in (3, 4)
    assert "latent 3: fires on" in said and f"into {out}" in said
    index = (out / "index.html").read_text()
    assert all(f'href="{name}"' in index for name in names - {"index.html"})
    page = (out / "latent_3.html").read_text()
    assert "Latent 3" in page and "standard" in page and "exponent of ‖x‖, learned" in page
    status, said, err = run(*words, *USUAL)
    assert (status, said) == (2, "") and "pass --overwrite" in errors(err)
    assert run("--sae", saes["cosine"], "--latents", 3, "--out", out, *USUAL, "--overwrite")[0] == 0


def test_pages_of_another_run_are_seen_before_the_model_runs(run, script, saes, tmp_path, monkeypatch):
    """Which pages `frequent:N` will write is not known yet: any page stands in the way. A number's page only by its own name."""
    monkeypatch.setattr(script.Settings, "load_model", lambda self: pytest.fail("the model is loaded"))
    (tmp_path / "latent_9.html").write_text("a page")
    words = ("--sae", saes["cosine"], "--out", tmp_path, "--latents")
    status, said, err = run(*words, "frequent:1")
    assert (status, said) == (2, "") and "latent_9.html" in errors(err) and "--overwrite" in errors(err)
    with pytest.raises(pytest.fail.Exception, match="the model is loaded"):
        run(*words, 3)


def test_the_top_of_an_atlas(run, given, saes, tmp_path):
    model = load_model(given / "model", device="cpu")
    some = tokenize(load_texts(str(given / "text.txt")), model.tokenizer, max_length=128, n_prompts=24)
    atlas = causal_atlas(model, some, {"standard": load_sae(saes["standard"])}, path_share=0, placebo_share=0)
    atlas.write(tmp_path / "atlas")
    words = (
        "--sae",
        saes["standard"],
        "--latents",
        "top:2",
        "--out",
        tmp_path / "cards",
        "--atlas",
        tmp_path / "atlas",
    )
    status, said, err = run(*words, *USUAL)
    assert status == 0, err
    even = atlas.frame.loc[atlas.frame.prompt % 2 == 0]
    best = even.groupby("latent").kl.sum().sort_values(ascending=False).index[:2]
    assert {p.name for p in (tmp_path / "cards").iterdir()} == {"index.html", *(f"latent_{i}.html" for i in best)}
    assert said.startswith(f"latent {best[0]}: ")
    page = (tmp_path / "cards" / f"latent_{best[0]}.html").read_text()
    assert "rank by total effect" in page
    assert re.search(r"differs by at most (0|[\d.·]*10⁻[⁵⁶⁷⁸⁹¹]\S*) nats at \d+ tokens measured again", page)
    status, said, err = run(*words, *USUAL, "--max-length", 9, "--overwrite")
    assert status == 2 and "none of the atlas' 24 prompts" in errors(err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--latents", 40), "latent 40 does not exist; cosine has 40, from 0"),
        (("--latents", "best:2"), "latent 'best:2'; expected a number"),
        (("--latents", "top:2"), "give --atlas, or frequent:N"),
        (("--latents", 1, "--top", 0), "--top 0"),
        (("--latents", 1, "--path", "fast"), "unknown path 'fast'"),
        (("--latents", 1, "--held-out", 1), "--held-out 1"),
        (("--latents", 1, "--atlas", "/nowhere"), "/nowhere holds no atlas"),
        (("--latents",), "no latent"),
    ],
)
def test_what_cannot_be_shown_is_said_before_the_model_runs(run, saes, tmp_path, words, message):
    status, said, err = run("--sae", saes["cosine"], "--out", tmp_path / "out", *words)
    assert (status, said) == (2, "") and message in errors(err), err
