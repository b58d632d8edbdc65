"""`train_sae.py` trains what the library trains on the same text."""

import json

import numpy as np
import pytest
import torch

from diagnostics.figures.training import training_metrics
from interventions import Site, load_model
from interventions.texts.held_out import split
from interventions.texts.prompts import load_texts, tokenize
from sae_models import load_sae
from sae_models.architectures import named
from sae_models.training.from_model import SAESpec, train_saes
from sae_models.training.recipe import Recipe
from tests.tiny import D_MODEL


def test_saes_match_the_library(script, given):
    words = ("--layers", 1, 3, "--saes", "standard", "cosine:topk", "--sites", "resid_post", "mlp_out", "2.resid_pre")
    run = script("train_sae", *words, "--seeds", 0, 5, "--log-every", 4)
    assert run.status == 0, run.err
    places = {"1": Site(1), "3": Site(3), "1.mlp_out": Site(1, "mlp_out"), "3.mlp_out": Site(3, "mlp_out")}
    places["2.resid_pre"] = Site(2, "resid_pre")
    wanted = {
        f"{where}/{name.replace(':', '-')}{'-seed5' if seed else ''}": SAESpec(
            site, named(name), Recipe(d_sae=48, k=4, lr=0.01, seed=seed)
        )
        for where, site in places.items()
        for name in ("standard", "cosine:topk")
        for seed in (0, 5)
    }
    weights = {f"{name}/{file}" for name in wanted for file in ("cfg.json", "sae_weights.safetensors")}
    figures = {f"training.{kind}" for kind in ("png", "svg", "pdf")}
    assert run.files.keys() == {"run.json", "metrics.jsonl", "manifest.json", *weights, *figures}
    assert "wrote 20 SAEs and training.png" in run.said and run.said.count("FVE") == 20
    texts, _ = split(load_texts(str(given / "text.txt")), 0.1)
    model = load_model(given / "model", device="cpu")
    prompts = tokenize(texts, model.tokenizer, max_length=20, seed=0)
    library = train_saes(model, prompts, wanted, tokens=330, batch_tokens=32, buffer_tokens=96)
    x = 30 * torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(0))
    for name, sae in library.items():
        ours = load_sae(run.folder / name)
        assert torch.equal(ours(x), sae(x)) and ours.encode(x).any()
        assert ours.hook_name == wanted[name].site.hook_name
    steps = [json.loads(line)["step"] for line in run.files["metrics.jsonl"].splitlines()]
    assert steps == [n for n in (4, 8, 10) for _ in wanted]


def test_sweep_equals_one_run_per_value(script):
    """Batches are identical, so SAEs are bitwise equal; names and recipes match too."""
    kinds = ("--saes", "standard", "cosine:topk", "standard:relu")
    sweep = script("train_sae", *kinds, "--k", 4, 6, "--l1", 0.1, 0.05, "--out", script.folder / "sweep")
    assert sweep.status == 0, sweep.err
    single = {
        (k, l1): script("train_sae", *kinds, "--k", k, "--l1", l1, "--out", script.folder / f"{k}").folder
        for k, l1 in ((4, 0.1), (6, 0.05))
    }
    found = {str(path.parent.relative_to(sweep.folder)) for path in sweep.folder.rglob("cfg.json")}
    assert found == {
        *(f"1/{name}-k{k}" for name in ("standard", "cosine-topk") for k in (4, 6)),
        *(f"1/standard-relu-l1_{l1}" for l1 in (0.1, 0.05)),
    }
    for (k, l1), folder in single.items():
        for alone, swept in (("standard", f"-k{k}"), ("cosine-topk", f"-k{k}"), ("standard-relu", f"-l1_{l1}")):
            one, two = load_sae(folder / f"1/{alone}"), load_sae(sweep.folder / f"1/{alone}{swept}")
            assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
            assert one.selector.settings() == two.selector.settings()
            recipe = two.metadata["recipe"]
            assert recipe["l1" if "relu" in alone else "k"] == (l1 if "relu" in alone else k)
    kept = [load_sae(sweep.folder / f"1/standard-k{k}").W_dec for k in (4, 6)]
    assert not torch.equal(*kept)


def run_of(script, *words):
    """Of the small text, in batches as small; nothing said of SAEs."""
    short = ("--max-length", 20, "--layers", 1, "--tokens", 330, "--batch-tokens", 32, "--buffer-tokens", 96)
    where = ("--model", script.given / "model", "--device", "cpu", "--prompts", script.given / "text.txt")
    return script("train_sae", *where, *short, *words, small=False)


def test_plan_equals_one_run_per_line(script):
    plan = script.folder / "plan.txt"
    lines = (
        "--saes gated --l1 0.1 0.2 --seeds 0 1 --d-sae 48",
        "--saes abstopk --k 4 --d-sae 40",
        "--saes gated --name half --d-sae 40",
    )
    plan.write_text("# widths differ\n\n" + "\n".join(lines))
    whole = run_of(script, "--plan", plan, "--sites", "1.mlp_out", "--out", script.folder / "whole")
    assert whole.status == 0, whole.err
    swept = [f"1.mlp_out/gated-l1_{l1}{seed}" for l1 in (0.1, 0.2) for seed in ("", "-seed1")]
    names = [swept, ["1.mlp_out/abstopk"], ["1.mlp_out/half"]]
    assert {str(path.parent.relative_to(whole.folder)) for path in whole.folder.rglob("cfg.json")} == {
        one for own in names for one in own
    }
    for i, (line, own) in enumerate(zip(lines, names, strict=True)):
        alone = run_of(script, *line.split(), "--sites", "1.mlp_out", "--out", script.folder / f"alone{i}").folder
        for name in own:
            one, two = load_sae(alone / name), load_sae(whole.folder / name)
            assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
            assert one.metadata["recipe"] == two.metadata["recipe"]


@pytest.mark.parametrize(
    ("lines", "words", "message"),
    [
        ("--saes gated", ("--saes", "abstopk"), "--saes beside --plan; expected it in the lines of "),
        ("\n--saes gated --tokens 5", (), "plan.txt, line 2: --tokens concerns the whole run; give it to the command"),
        ("--saes gated\n--saes gated --l1 0.3", (), "line 2: 1/gated is there already; give one another --name"),
        ("--saes gated --name a --l1 x", (), "line 1: "),
        ("--saes gated abstopk --name a", (), "line 1: --name a for --saes gated abstopk; expected one kind of SAE"),
        ("# nothing", (), "names no SAE; expected lines such as --saes gated"),
    ],
)
def test_invalid_plans_exit_2_with_one_line(script, lines, words, message):
    plan = script.folder / "plan.txt"
    plan.write_text(lines)
    assert message in run_of(script, "--plan", plan, *words).error


def test_sweep_of_widths_equals_one_run_per_width(script):
    """Names contain the width only if there are several; parameters are bitwise equal."""
    kinds = ("--saes", "standard:topk", "--k", 3, 4)
    sweep = script("train_sae", *kinds, "--d-sae", 40, 48, "--out", script.folder / "sweep")
    assert sweep.status == 0, sweep.err
    found = {str(path.parent.relative_to(sweep.folder)) for path in sweep.folder.rglob("cfg.json")}
    assert found == {f"1/standard-topk-d{d}-k{k}" for d in (40, 48) for k in (3, 4)}
    alone = script("train_sae", "--saes", "standard:topk", "--k", 4, "--d-sae", 40, "--out", script.folder / "alone")
    one, two = load_sae(alone.folder / "1/standard-topk"), load_sae(sweep.folder / "1/standard-topk-d40-k4")
    assert (two.d_sae, two.metadata["recipe"]["d_sae"]) == (40, 40)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--d-sae", 40, 40), "--d-sae 40 40 names one twice"),
        (("--k", 4, 4), "--k 4.0 4.0 names one twice"),
        (("--saes", "standard:relu", "--k", 4, 6), "--k 4 6 for --saes standard:relu; expected one value"),
        (("--l1", 0.1, 0.2), "--l1 0.1 0.2 for --saes standard; expected one value"),
        (("--k", 0), "--k 0.0; expected a number above 0"),
        (("--keep-every", 1), "keep_every 1 is before step 2, from which BatchTopK learns its threshold"),
    ],
)
def test_invalid_sweeps_exit_2_with_one_line(script, words, message):
    assert message in script("train_sae", *words).error


def test_kept_checkpoints_are_saes_with_their_metrics(script):
    run = script("train_sae", "--saes", "cosine", "--keep-every", 4, "--log-every", 5)
    metrics = training_metrics(run.folder)
    assert metrics["step"].tolist() == [4, 5, 8, 10]
    for step, line in zip(metrics["step"], metrics.to_dict("records"), strict=True):
        place = f"1/cosine/tokens-{32 * step}" if step % 4 == 0 else "1/cosine"
        if step != 5:
            sae = load_sae(run.folder / place)
            assert sae.metadata["training"] == line
            expected = np.quantile(sae.score.exponents().double().numpy(), (0.05, 0.25, 0.5, 0.75, 0.95))
            np.testing.assert_allclose([line[f"a_{q}"] for q in ("05", "25", "50", "75", "95")], expected, rtol=1e-12)


def test_sae_of_an_unknown_run_is_not_replaced(script):
    (script.folder / "out/1").mkdir(parents=True)
    other = script.finished("train_sae").folder / "1/standard"
    (script.folder / "out/1/standard").symlink_to(other)
    refused = script("train_sae")
    assert "has 1/standard, and no run.json that says which run wrote it; it is left as it is" in refused.error
    assert (script.folder / "out/1/standard").is_symlink()


def test_a_figure_of_an_unknown_run_is_not_replaced(script):
    (script.folder / "out").mkdir()
    (script.folder / "out/training.png").write_bytes(b"mine")
    assert "training.png is there, and no run.json that says which run drew it" in script("train_sae").error
    assert (script.folder / "out/training.png").read_bytes() == b"mine"


def test_options_reach_recipe_and_stream(script):
    words = ("--saes", "aligned", "--layer-norm", "--held-out", 0, "--sink-filter", 0, "--lr-scale", 0.5)
    run = script("train_sae", *words, "--seed", 3, "--order-seed", 2)
    sae = load_sae(run.folder / "1/aligned-seed3")
    assert sae.normalise.kind == "layer_norm" and (sae.alignment() - 1).abs().max() < 1e-6
    assert (sae.metadata["recipe"]["lr_scale"], sae.metadata["recipe"]["seed"]) == (0.5, 3)
    assert (sae.metadata["seed"], sae.metadata["sink_filter"]) == (2, None)
    assert sae.d_sae == 48 and sae.metadata["tokens"] == 320
