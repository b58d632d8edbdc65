"""Every command: its help, invalid input on one line, and finished results that are never replaced without --overwrite."""

import functools
import json
import re
import shutil
from pathlib import Path

import pytest

from tests.scripts.conftest import SCRIPTS, SMALL, Script

COMMANDS = sorted(path.stem for path in SCRIPTS.glob("*.py"))
IN_A_FOLDER = sorted(
    SMALL.keys() - {"bench_patching", "bench_replay", "bench_sae_training", "bench_workers", "report", "train_zoo"}
)
"""commands whose small run needs no other model or text and writes into a folder; the others have separate tests"""


@pytest.fixture(scope="session")
def help_of(tmp_path_factory):
    """The help of a command, 80 columns wide, without its boxes."""

    @functools.cache
    def text(name: str) -> str:
        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", "80")
            ended = Script(folder, folder)(name, "--help", small=False)
        assert (ended.status, ended.err) == (0, "")
        return re.sub(r"^│ ?| *│$", "", ended.said, flags=re.MULTILINE)

    return text


@pytest.fixture
def options(help_of):
    """The options in the help of a command; with a pattern, those followed by it."""

    def found(name, kind=""):
        boxes = help_of(name).partition("usage:")[2]
        return re.findall(rf"^(?:-h, )?(--[a-z0-9-]+){kind}", boxes, re.MULTILINE)

    return found


def test_every_command_has_a_small_run():
    assert sorted(SMALL) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_purpose_examples_exit_codes_and_every_option(name, help_of, options):
    text, given = help_of(name), options(name)
    assert text.split("\n\n")[0].count("\n") <= 1
    examples = re.findall(r"^(?:Examples?:| {2}).*?(scripts/\w+\.py) .*", text, re.MULTILINE)
    assert set(examples) == {f"scripts/{name}.py"}
    assert "Exit codes: 0 done; 2 " in text
    assert len(set(given)) == len(given) and {"--help", "--json", "--quiet"} <= set(given)
    assert options(name, r"(?: [A-Z]+)*(?: \.\.\.)?\s+[^\s(-]") == given  # words, not only a default, behind each
    assert "(default: )" not in text and "{None}" not in text
    assert all(len(line) <= 80 for line in text[text.index("usage:") :].splitlines()[1:])


SHARED = {
    "--data": (("nothing",), "no labelled texts 'nothing'"),
    "--device": (("tpu7",), "unknown device 'tpu7'; expected cpu, cuda or cuda:N"),
    "--dtype": (("int8",), "unknown dtype 'int8'; known: float32, bfloat16, float16"),
    "--held-out": ((1,), "--held-out 1.0; expected a number from 0 to below 1"),
    "--horizon": (("soon",), "horizon 'soon'; expected a number of positions"),
    "--null-model": (("shuffled",), "invalid choice 'shuffled' for argument '--null-model'. Expected one of ('none', "),
    "--path": (("fast",), "invalid choice 'fast' for argument '--path'. Expected one of ('auto', "),
    "--prompts": (("/nowhere.txt",), "no file '/nowhere.txt'"),
    "--saes": (("no/such/sae", "nor/this"), "no SAE 'no/such/sae'"),
    "--seed": (("many",), "--seed"),
    "--sites": (("resid_psot",), "no site 'resid_psot'"),
}
"""Invalid values of shared options: words and message."""


@pytest.mark.parametrize("name", COMMANDS)
def test_shared_options_are_checked_before_loading_the_model(script, name, options):
    known = options(name)
    model = ("--model", "/nowhere/at/all") if "--model" in known else ()
    faults = {"--no-such-option": ((3,), "no option --no-such-option")} | SHARED
    if model:
        faults["--model"] = (("/nowhere/at/all",), "no model folder '/nowhere/at/all'")
    if "--out" in known and name != "report":  # whose --out is a page
        (script.folder / "file").write_text("no folder")
        faults["--out"] = ((script.folder / "file",), "cannot write to ")
    for option, (words, message) in faults.items():
        if option in [*known, "--no-such-option"]:
            one_sae = (name, option) == ("latent_card", "--saes")
            ended = script(name, *model, option, *words[: 1 if one_sae else None])
            assert message in ended.error and ended.err.count("\n") == 1, option
            assert not ended.folder.is_dir() or not ended.files, option


@pytest.mark.parametrize("name", COMMANDS)
def test_numbers_out_of_range_raise_before_loading_the_model(script, name, options, no_model):
    """The error names the option (or the recipe's field), value and range; no option accepts NaN or a negative integer."""
    for kind, value in (("INT", "-1"), ("FLOAT", "nan")):
        for option in options(name, rf" {kind}\b"):
            error = script(name, option, *[value] * (2 if option == "--betas" else 1)).error
            field = option.removeprefix("--").replace("-", "_")
            assert re.match(rf"({option} {value}|{field} = .*{value}.*); expected ", error), error


def test_shared_options_exist_in_several_commands(options):
    for option in SHARED:
        assert sum(option in options(name) for name in COMMANDS) >= 2, option


REFUSED = [
    ("ablate_features", ("--arms", "best"), "--arms best; known: selected, random, placebo, keep"),
    ("ablate_features", ("--concepts", "d"), "--concepts d; the texts have: a, b, c"),
    ("ablate_features", ("--per-class", 3), "--per-class 3; expected 4 or more"),
    ("ablate_features", ("--rankings", "worst"), "--rankings worst; known: mean_difference"),
    ("compare_saes", ("--cosine", 0), "--cosine 0.0; expected a number from above 0 to 1"),
    ("compare_saes", ("--per-class", 4), "--per-class 4; expected 5 or more"),
    ("compare_saes", ("--saes", "{given}/saes/1/standard"), "1 SAE; a comparison needs two or more"),
    (
        "compare_saes",
        ("--saes", "{given}/saes/1/standard", "{given}/saes/4/standard"),
        "SAEs of blocks.1.hook_resid_post, blocks.4.hook_resid_post; SAEs are compared at one site",
    ),
    ("dose_response", ("--doses", 0.1, 2.5), "--doses 2.5; expected a number from above 0 to 2"),
    ("dose_response", ("--directions", "/nowhere/d.npy"), "cannot read direction /nowhere/d.npy"),
    ("dose_response", ("--directions", "/nowhere/d.txt"), "no direction in /nowhere/d.txt; expected a .npy or .pt"),
    ("evaluate_saes", ("--held-out", 0, "--on-training-text"), "--on-training-text needs --held-out above 0"),
    (
        "evaluate_saes",
        (
            "--saes",
            "{given}/saes/none",
        ),
        "no SAE",
    ),
    (
        "evaluate_saes",
        (
            "--saes",
            "{given}/text.txt",
        ),
        "text.txt",
    ),
    ("evaluate_saes", ("--saes", "{given}/saes/wide", "{given}/saes/wide"), "is given twice"),
    ("faithfulness", ("--edges", "/nowhere"), "expected --circuit or --edges, and not both"),
    ("faithfulness", ("--circuit", "z.20"), "z.20"),
    ("faithfulness", ("--circuit", "--edges", "/nowhere"), "/nowhere"),
    ("interactions", ("--batch-rows", 4), "no option --batch-rows"),
    ("interactions", ("--coefficients", 1, 2, 1), "each once"),
    ("interactions", ("--parts", "pears"), "--parts pears; known: pairs, matrix"),
    ("interactions", ("--per-token", 1), "--per-token 1; expected 2 or more"),
    ("interactions", ("--unit", "z"), "invalid choice 'z' for argument '--unit'"),
    ("patch_direction_norm", ("--context", "everywhere"), "invalid choice 'everywhere' for argument '--context'"),
    ("patch_direction_norm", ("--max-length", 1), "--max-length 1; expected 2 or more"),
    ("plot_depth", ("--figures", "depth"), "no figure 'depth'; known: direction_norm_kl"),
    ("plot_depth", ("--figures", "win_rate"), "nothing to draw by depth: zoo: a SAEEvaluation has no figure by depth"),
    ("plot_depth", ("/nowhere",), "no folder"),
    ("plot_depth", ("{given}/saes",), "no result in"),
    ("report", ("/nowhere",), "no folder"),
    ("report", ("{given}/saes",), "no result in"),
    ("report", ("{given}/saes", "{given}/saes"), "given twice"),
    ("report", ("--out", "/nowhere/page.html"), "no folder /nowhere to write page.html into"),
    ("latent_card", ("--atlas", "/nowhere"), "/nowhere holds no atlas"),
    ("latent_card", ("--latents", 40), "latent 40 does not exist; cosine has 40, from 0"),
    ("latent_card", ("--latents", "best:2"), "latent 'best:2'; expected a number"),
    ("latent_card", ("--latents", "top:2"), "give --atlas, or frequent:N"),
    ("latent_card", ("--latents",), "no latent"),
    ("latent_card", ("--saes", "no/such/sae"), "no SAE 'no/such/sae'"),
    ("latent_card", ("--saes", "a/b", "c/d"), "--saes names 2 SAEs, a/b, c/d; expected one"),
    ("latent_card", ("--sae", "a/b"), "no option --sae (did you mean --saes?)"),
    ("patch_direction_norm", ("--pair_set", "random"), "no option --pair_set (did you mean --pair-sets?)"),
    ("specification_curve", ("--pair-sets", "random"), "--pair-sets"),
    ("specification_curve", ("--prompts", "boolq,boolq"), "two texts have the name 'boolq'"),
    ("train_sae", ("--d-sae", 0), "d_sae = 0; expected a positive number"),
    ("train_sae", ("--reweight", 3), "reweight = 3"),
    ("train_sae", ("--saes", "standard:gate"), "no selector 'gate'; known: topk, batchtopk, abstopk"),
    ("train_sae", ("--saes", "standard", "standard"), "names one twice"),
    ("train_sae", ("--warm-up", 2), "warm_up = 2.0; expected a share of the run"),
    ("train_zoo", ("--only", "tiger"), "nothing in the zoo is called tiger; known: "),
    ("win_rate", ("--min-tokens", 1), "--min-tokens 1; expected 3 or more"),
    ("win_rate", ("--sampling", "all"), "invalid choice 'all' for argument '--sampling'"),
]
"""Invalid input of one command: its name, words and message."""


@pytest.mark.parametrize(("name", "words", "message"), REFUSED)
def test_own_options_are_checked_before_loading_the_model(script, name, words, message, no_model):
    ended = script(name, *(str(word).format(given=script.given) for word in words))
    assert message in ended.error and ended.err.count("\n") == 1
    assert not ended.folder.is_dir() or not ended.files


NEEDS_THE_MODEL = [
    ("dose_response", ("--horizon", 2, "--context", "both"), "a single token has no later positions"),
    (
        "evaluate_saes",
        (
            "--saes",
            "{given}/saes/wide",
        ),
        "width 16 for activations of width 32",
    ),
    ("evaluate_saes", ("--n-prompts", 400), "expected 400"),
    ("evaluate_saes", ("--sink-filter", 1e-6), "no token is left at 1.resid_post"),
    ("faithfulness", ("--scope", "z"), "3.mlp_out is in the circuit but not in the scope (z)"),
    ("patch_direction_norm", ("--layers", 3, 30), "no block 30 in a model of 6 blocks; layers run from 0 to 5"),
    ("patch_direction_norm", ("--model", "nobody/has-this-model"), "nobody/has-this-model"),
    ("patch_direction_norm", ("--n-prompts", 1), "1 prompt; "),
    (
        "patch_direction_norm",
        ("--pair-sets", "rand"),
        "no pair set 'rand'; known: random, same_norm, high_cosine, scale_rotate",
    ),
    ("patch_direction_norm", ("--pairs", 10**5), "tokens for 100000 pairs"),
    ("patch_direction_norm", ("--sink-filter", 1e-3), "none of 20 pairs is left, dropped: "),
    ("patch_direction_norm", ("--sites", "9.attn_out"), "no block 9 in a model of 6 blocks"),
    ("probe_saes", ("--saes", "{given}/saes/wide"), "width 16 for activations of width 32"),
    ("train_sae", ("--k", 49), "k = 49"),
    ("train_sae", ("--layers", 6), "no block 6 in a model of 6 blocks"),
    ("train_sae", ("--saes", "standard:topk", "--k", 2.5), "k = 2.5 for TopK"),
    ("train_sae", ("--tokens", 31), "1 SAEs on 31 tokens in batches of 32"),
    ("unit_norm", ("--sink-filter", 1e-3), "is left, dropped"),
]


@pytest.mark.parametrize(("name", "words", "message"), NEEDS_THE_MODEL)
def test_invalid_input_after_loading_exits_2_without_result(script, name, words, message):
    ended = script(name, *(str(word).format(given=script.given) for word in words))
    assert message in ended.error
    assert ended.files.keys() <= {"run.json", "metrics.jsonl"}


def warned(run) -> list[str]:
    """Lines on stderr, without progress bars and the warning that a small run has few prompts."""
    lines = run.err.replace("\r", "\n").splitlines()
    return [
        line for line in lines if line.strip() and not re.search(r"%\||warning: an interval from \d+ prompts", line)
    ]


def provenances_in(document: dict) -> list[dict]:
    """Of each run in a result's JSON; of a result of several runs they stand by name."""
    p = document.get("provenance", {})
    return [p] if "model" in p or "planted" in p else [some for some in p.values() if isinstance(some, dict)]


LONG = {
    "activation_patching", "atlas", "causal_dimension", "compare_saes", "disentangle", "dose_response", "faithfulness", "interactions",
    "patch_direction_norm", "scaling_laws", "specification_curve", "win_rate",
}  # fmt: skip
"""Commands whose two small runs take four seconds or more."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in IN_A_FOLDER]
)
def test_finished_results_are_replaced_only_with_overwrite(script, name, help_of, options):
    """The same command continues or is refused; another run is refused unless --overwrite is given."""
    run = script.finished(name)
    assert warned(run) == []
    table, wrote = " ".join(run.said.split()).split(" wrote ", 1)
    assert table and f"into {run.folder}" in wrote
    shutil.copytree(run.folder, script.folder / "out")
    before = run.files
    for p in (p for path, text in before.items() if path.endswith(".json") for p in provenances_in(json.loads(text))):
        assert Path(p["command"][0]).name == f"{name}.py" and "--out" not in p["command"]
        assert ("--model" in p["command"]) != ("planted" in p)
    again = script(name)
    if "the same command goes on" in " ".join(help_of(name).split()):
        assert again.status == 0, again.err
    else:
        assert "--overwrite" in again.error
    assert again.files == before
    other = ("--seed", 1) if "--seed" in options(name) else ("--figures", "sae_evaluation")
    refused = script(name, *other)
    assert "nother" in refused.error
    assert refused.files == before
    if "--overwrite" not in options(name):
        return
    if "--model" in options(name):  # without run.json they are refused before the model is loaded
        for path in script.folder.rglob("run.json"):
            if path.parent.name != "saes":  # a training's, whose SAEs are then nobody's
                path.unlink()
        assert "--overwrite" in script(name, "--model", "/nowhere/at/all").error
    replaced = script(name, *other, "--overwrite", "--json", "--quiet")
    assert replaced.status == 0 and warned(replaced) == []
    document = json.loads(replaced.said, parse_constant=lambda word: pytest.fail(word))
    for part in [document] if "files" in document else document.values():
        assert part["files"] and all((script.folder / part["out"] / file).exists() for file in part["files"])
    assert replaced.files != before
