"""Both commands of projection ablations, from their options to their files, on a tiny model and SAEs in folders."""

import importlib.util
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from diagnostics.contests import WinRateReport
from diagnostics.projections import ProjectionEffects, projection_effects
from interventions import Site, record
from sae_models.architectures import build, named
from sae_models.errors import CheckpointError
from sae_models.loading import load_sae
from sae_models.saving import save_sae
from tests.tiny import D_MODEL, prompts, tiny_model

SCRIPTS = Path(__file__).parents[2] / "scripts"
FEW = ("--held-out", 0, "--latents", 4, "--tokens-per-latent", 30, "--detail", 0.3)


def module(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # where dataclasses look up their own annotations
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def script():
    """The command that tests run: it does all that the other one does, first."""
    return module("win_rate")


@pytest.fixture(scope="module")
def saes(tmp_path_factory):
    """Two SAEs of the tiny model at blocks 2 and 5, in folders."""
    folder, made = tmp_path_factory.mktemp("saes"), []
    for layer, name in ((2, "standard:relu"), (5, "cosine:relu")):
        site = Site(layer)
        x = record(tiny_model("llama"), prompts((24, 24)), [site]).activations[site].reshape(-1, D_MODEL)
        sae = build(named(name), 24, 6, x, torch.Generator().manual_seed(0), hook_name=site.hook_name)
        made.append(folder / str(layer) / name.partition(":")[0])
        save_sae(sae, made[-1])
    return made


def ended(run, *words, model: bool = True) -> str:
    """The one line of an input that does not serve."""
    status, _, err = run(*words, model=model)
    assert status == 2 and "Traceback" not in err
    return err.rstrip("\n").split("\n")[-1].removeprefix("error: ")


def test_a_run_leaves_its_tables_and_figures_and_they_are_those_of_the_library(
    run, script, given, saes, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    status, said, err = run("--saes", *saes, "--out", out, *FEW, "--single-token-share", 1, "--draws", 10)
    assert status == 0 and "Traceback" not in err, err
    names = {path.name for path in out.iterdir()}
    assert {*WinRateReport.files(), "win_rate.png", "win_rate_paradox.svg", "projections.parquet"} <= names
    assert "true margin > 0" in said and f"into {out}" in said
    before = (out / "win_rate.json").read_bytes()
    other = ("--single-token-share", 1, "--draws", 12)  # the same run, judged in another way
    assert ended(run, "--saes", *saes, "--out", out, *FEW, *other).startswith(
        f"{out} holds another result (win_rate.json)"
    )
    assert (out / "win_rate.json").read_bytes() == before
    found = ProjectionEffects.load(out)
    assert found.saes == ["standard", "cosine"] and found.provenance["context"] == ["in_place", "single_token"]
    settings = script.Settings(
        out=out, model=str(given / "model"), prompts=str(given / "text.txt"), n_prompts=24, device="cpu", held_out=0,
        saes=tuple(map(str, saes)),
    )  # fmt: skip
    model, texts = settings.load()
    again = projection_effects(
        model, texts, {"standard": load_sae(saes[0]), "cosine": load_sae(saes[1])}, latents=4, tokens_per_latent=30, detail=0.3,
        single_token_share=1.0, context="both",
    )  # fmt: skip
    pd.testing.assert_frame_equal(found.frame, again.frame)
    from_it = tmp_path / "report"
    monkeypatch.setattr(WinRateReport, "figures", lambda self: {})  # drawn once is enough
    status, said, err = run("--results", out, "--out", from_it, "--draws", 10, model=False)
    assert status == 0, err
    one, other = (pd.read_parquet(folder / "win_rate.parquet") for folder in (out, from_it))
    pd.testing.assert_frame_equal(one, other)


def test_the_ablations_alone(run, given, saes, tmp_path, monkeypatch, capsys):
    ablate = module("ablate_projections")
    out = tmp_path / "out"
    words = ["--saes", saes[0], "--out", out, *FEW, "--model", given / "model", "--prompts", given / "text.txt"]
    monkeypatch.setattr(sys, "argv", [ablate.__file__, *map(str, [*words, "--n-prompts", 24, "--device", "cpu"])])
    ablate.command.run(ablate.Settings, ablate.main)
    assert {p.name for p in out.glob("projections*")} == {
        *(f"projections{end}" for end in (".parquet", ".json")),
        *(f"projections_{name}.{kind}" for name in ("dose", "exponent") for kind in ("png", "svg", "pdf")),
    }
    assert "norm exponent" in capsys.readouterr().out


def test_input_that_does_not_serve_is_said_on_one_line(run, saes, tmp_path):
    out = tmp_path / "out"
    given = ("--saes", saes[0], "--out", out)
    assert "no SAE" in ended(run, "--saes", "smollm2-135m/15/none", "--out", out)
    assert "Unrecognized options: --horizon" in ended(run, *given, "--horizon", 4)
    assert "--sampling all" in ended(run, *given, "--sampling", "all")
    assert "--min-tokens 1" in ended(run, *given, "--min-tokens", 1)
    assert "holds no projections result" in ended(run, "--results", tmp_path / "none", "--out", out, model=False)
    assert "leave out --latents" in ended(run, "--results", tmp_path, "--latents", 3, "--out", out, model=False)
    assert "is given twice" in ended(run, "--results", saes[0], saes[0], "--out", out, model=False)
    assert not (out / "projections.parquet").exists()


@pytest.mark.model
def test_kinds_of_the_packaged_zoo_are_named_by_their_blocks(script, tmp_path):
    settings = script.Settings(out=tmp_path, layers=(7, 22))
    assert list(settings.load_saes()) == ["7/standard", "22/standard", "7/cosine", "22/cosine"]
    counterpart = script.Settings(out=tmp_path, model="smollm2-135m-layernorm", saes=("cosine",), layers=(15,))
    assert list(counterpart.load_saes()) == ["cosine"]
    with pytest.raises(CheckpointError, match="no SAE"):
        script.Settings(out=tmp_path, saes=("nothing",)).load_saes()
