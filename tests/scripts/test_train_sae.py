"""The command from its options to its files, on a tiny model in a folder."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from diagnostics.held_out import split
from diagnostics.progress import Progress
from diagnostics.sae_training import Wanted, train_saes
from interventions import Site, load_model
from interventions.texts import load_texts, tokenize
from sae_models import load_sae
from sae_models.architectures import named
from sae_models.training import Recipe
from tests.tiny import D_MODEL

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_sae.py"
SMALL = ("--d-sae", 48, "--k", 4, "--lr", 0.01, "--tokens", 330, "--batch-tokens", 32, "--buffer-tokens", 96)


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("train_sae", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their own annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def train(run, given):
    """The command on the tiny model and text."""
    shared = ("--model", given / "model", "--prompts", given / "text.txt", "--device", "cpu", "--max-length", 20)

    def command(out, *words):
        return run("--out", out, *SMALL, *shared, *words, model=False)

    return command


def one_line(err: str) -> str:
    """The only line of an error, after what transformers says of a folder's weights and the bar of what was done."""
    *before, last = err.replace("\r", "\n").rstrip("\n").split("\n")
    assert all(not line.strip() or "Loading weights" in line or "training" in line for line in before)
    assert last.startswith("error: ")
    return last.removeprefix("error: ")


def kept(folder):
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files.pop("lock", None)
    return files


def test_a_run_leaves_its_files_and_they_are_those_of_the_library(train, given, tmp_path):
    out = tmp_path / "out"
    words = ("--layers", 1, 3, "--saes", "standard", "cosine:topk", "--sites", "resid_post", "mlp_out", "2.resid_pre")
    status, said, err = train(out, *words, "--seeds", 0, 5, "--log-every", 4)
    assert status == 0, err
    assert "Traceback" not in err
    places = {"1": Site(1), "3": Site(3), "1.mlp_out": Site(1, "mlp_out"), "3.mlp_out": Site(3, "mlp_out")}
    places["2.resid_pre"] = Site(2, "resid_pre")
    wanted = {
        f"{where}/{name.replace(':', '-')}{'-seed5' if seed else ''}": Wanted(
            site, named(name), Recipe(d_sae=48, k=4, lr=0.01, seed=seed)
        )
        for where, site in places.items()
        for name in ("standard", "cosine:topk")
        for seed in (0, 5)
    }
    weights = {f"{name}/{file}" for name in wanted for file in ("cfg.json", "sae_weights.safetensors")}
    assert kept(out).keys() == {"run.json", "metrics.jsonl", "manifest.json", *weights}
    assert f"wrote 20 SAEs into {out}" in said and said.count("FVE") == 20
    texts, _ = split(load_texts(str(given / "text.txt")), 0.1)
    model = load_model(str(given / "model"), device="cpu")
    prompts = tokenize(texts, model.tokenizer, max_length=20, seed=0)
    library = train_saes(model, prompts, wanted, tokens=330, batch_tokens=32, buffer_tokens=96)
    x = 30 * torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(0))
    for name, sae in library.items():
        ours = load_sae(out / name)
        assert torch.equal(ours(x), sae(x)) and ours.encode(x).any()
        assert ours.hook_name == wanted[name].site.hook_name
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [n for n in (4, 8, 10) for _ in wanted]
    before = kept(out)
    assert train(out, *words, "--seeds", 0, 5, "--log-every", 4)[0] == 0
    assert kept(out) == before
    status, said, err = train(out, *words, "--seeds", 0, 6, "--log-every", 4)
    assert (status, said) == (2, "") and "holds another run (jobs.1/standard-seed5 only there" in one_line(err)
    assert kept(out) == before


def test_an_sae_that_somebody_else_put_there_is_left_as_it_is(train, tmp_path):
    words = ("--layers", 1, "--saes", "standard")
    assert train(tmp_path / "other", *words, "--seed", 5)[0] == 0
    (tmp_path / "out" / "1").mkdir(parents=True)
    (tmp_path / "other" / "1" / "standard-seed5").rename(tmp_path / "out" / "1" / "standard")
    before = kept(tmp_path / "out")
    status, said, err = train(tmp_path / "out", *words)
    assert (status, said) == (2, "")
    assert "has 1/standard, and no run.json that says which run wrote it; it is left as it is" in one_line(err)
    assert kept(tmp_path / "out") == before


def test_options_reach_what_they_name(train, tmp_path):
    words = ("--layers", 1, "--saes", "aligned", "--layer-norm", "--held-out", 0, "--sink-filter", 0, "--lr-scale", 0.5)
    assert train(tmp_path, *words, "--seed", 3, "--order-seed", 2)[0] == 0
    sae = load_sae(tmp_path / "1" / "aligned-seed3")
    assert sae.normalise.kind == "layer_norm" and (sae.alignment() - 1).abs().max() < 1e-6
    assert (sae.metadata["recipe"]["lr_scale"], sae.metadata["recipe"]["seed"]) == (0.5, 3)
    assert (sae.metadata["seed"], sae.metadata["sink_filter"]) == (2, None)
    assert sae.d_sae == 48 and sae.metadata["tokens"] == 320


def test_interrupted_it_goes_on_to_the_same_bytes(train, script, tmp_path, monkeypatch):
    words = ("--layers", 1, "--saes", "standard", "--checkpoint-every", 3)
    assert train(tmp_path / "undisturbed", *words)[0] == 0
    steps = []

    def stop(self, n, total, said):
        steps.append(n)
        if len(steps) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "training", stop)
        status, _, err = train(tmp_path / "out", *words)
    assert status == 130 and err.rstrip().endswith("interrupted")
    assert (tmp_path / "out" / "checkpoint.pt").exists()
    assert train(tmp_path / "out", *words)[0] == 0
    assert kept(tmp_path / "out") == kept(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--saes", "stadnard"), "no SAE 'stadnard'; known: standard, cosine"),
        (("--saes", "standard:gate"), "no selector 'gate'; known: relu, topk, batchtopk"),
        (("--sites", "resid_psot"), "no site 'resid_psot'"),
        (("--layers", -1), "layer -1 is negative"),
        (("--held-out", 1), "--held-out 1.0; expected a share from 0 (none) to below 1"),
        (("--warm-up", 2), "warm_up = 2.0; expected a share of the run"),
        (("--d-sae", 0), "d_sae = 0; expected a positive number"),
        (("--reweight", 3), "reweight = 3"),
        (("--dtype", "int8"), "unknown dtype 'int8'"),
        (("--device", "tpu7"), "unknown device 'tpu7'"),
        (("--latents", 3), "--latents"),
    ],
)
def test_options_are_looked_at_before_the_model(run, tmp_path, words, message):
    status, said, err = run("--out", tmp_path / "out", "--model", "/nowhere/at/all", *words, model=False)
    assert (status, said) == (2, "")
    assert message in one_line(err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layers", 6), "no block 6 in a model of 6 blocks"),
        (("--tokens", 31), "1 SAEs on 31 tokens in batches of 32"),
        (("--batch-tokens", 0), "in batches of 0"),
        (("--log-every", 0), "logged every 0"),
        (("--k", 49), "k = 49"),
        (("--saes", "standard:topk", "--k", 2.5), "k = 2.5 for TopK"),
        (("--prompts", "/nowhere.txt"), "no file '/nowhere.txt'"),
        (("--sink-filter", -1), "sink_filter -1.0"),
    ],
)
def test_what_needs_the_model_is_one_line_too(train, tmp_path, words, message):
    status, said, err = train(tmp_path / "out", "--layers", 1, *words)
    assert (status, said) == (2, "")
    assert message in one_line(err)
