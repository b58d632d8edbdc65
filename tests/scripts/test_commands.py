"""What holds for every command: its help, input that is refused on one line, and finished results that stay as they are."""

import functools
import json
import re
import shutil

import pytest

from tests.scripts.conftest import SCRIPTS, SMALL, Script

COMMANDS = sorted(path.stem for path in SCRIPTS.glob("*.py"))
IN_A_FOLDER = sorted(SMALL.keys() - {"bench_replay", "bench_sae_training", "report", "train_zoo"})
"""those whose small run needs no other model or text and writes into a folder; the others have tests of their own"""


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
    """The options of a command, by its help; with a pattern, those of which what follows fits it."""
    return lambda name, kind="": re.findall(rf"^(?:-h, )?(--[a-z0-9-]+){kind}", help_of(name), re.MULTILINE)


def test_every_command_has_a_small_run():
    assert sorted(SMALL) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_for_and_documents_every_option(name, help_of, options):
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
    "--held-out": ((1,), "--held-out 1.0; expected a share from 0"),
    "--horizon": (("soon",), "horizon 'soon'; expected a number of positions"),
    "--null-model": (("shuffled",), "unknown null model 'shuffled'; known: none, random"),
    "--path": (("fast",), "unknown path 'fast'; known: auto, "),
    "--prompts": (("/nowhere.txt",), "no file '/nowhere.txt'"),
    "--saes": (("no/such/sae", "nor/this"), "no SAE 'no/such/sae'"),
    "--seed": (("many",), "--seed"),
    "--sites": (("resid_psot",), "no site 'resid_psot'"),
}
"""What commands that share an option refuse: words and message."""


@pytest.mark.parametrize("name", COMMANDS)
def test_shared_options_are_checked_before_the_model_is_loaded(script, name, options):
    known = options(name)
    model = ("--model", "/nowhere/at/all") if "--model" in known else ()
    faults = {"--no-such-option": ((3,), "Unrecognized options: --no-such-option")} | SHARED
    if model:
        faults["--model"] = (("/nowhere/at/all",), "no model folder '/nowhere/at/all'")
    if "--out" in known and name != "report":
        (script.folder / "file").write_text("no folder")
        faults["--out"] = ((script.folder / "file",), "cannot write to ")
    for option, (words, message) in faults.items():
        if option in [*known, "--no-such-option"]:
            ended = script(name, *model, option, *words)
            assert message in ended.error and ended.err.count("\n") == 1, option
            assert not ended.folder.is_dir() or not ended.files, option


def test_shared_options_are_those_of_several_commands(options):
    for option in SHARED:
        assert sum(option in options(name) for name in COMMANDS) >= 2, option


REFUSED = [
    ("ablate_features", ("--arms", "best"), "--arms best; known: selected, random, placebo, keep"),
    ("ablate_features", ("--concepts", "d"), "--concepts d; the texts have: a, b, c"),
    ("ablate_features", ("--counts", 0), "counts from 1"),
    ("ablate_features", ("--per-class", 3), "--per-class 3"),
    ("ablate_features", ("--rankings", "worst"), "--rankings worst; known: mean_difference"),
    ("atlas", ("--context", "both"), "Unrecognized options: --context"),
    ("compare_saes", ("--cosine", 0), "threshold cosine 0.0; expected a number above 0"),
    ("compare_saes", ("--min-active", 0), "min_active 0; expected 1 or more"),
    ("compare_saes", ("--per-class", 4), "--per-class 4; expected"),
    ("compare_saes", ("--saes", "{given}/saes/1/standard"), "1 SAE; a comparison needs two or more"),
    (
        "compare_saes",
        ("--saes", "{given}/saes/1/standard", "{given}/saes/4/standard"),
        "SAEs of blocks.1.hook_resid_post, blocks.4.hook_resid_post; dictionaries are compared at one site",
    ),
    ("dose_response", ("--directions", "/nowhere/d.npy"), "cannot read direction /nowhere/d.npy"),
    ("dose_response", ("--directions", "/nowhere/d.txt"), "no direction in /nowhere/d.txt; expected a .npy or .pt"),
    ("eval_sae", ("--held-out", 0, "--on-training-text"), "give a share above 0"),
    ("eval_sae", ("--splice-prompts", -1), "--splice-prompts -1"),
    ("eval_sae", ("{given}/saes/none",), "no SAE"),
    ("eval_sae", ("{given}/text.txt",), "text.txt"),
    ("eval_sae", ("{given}/saes/wide", "{given}/saes/wide"), "is given twice"),
    ("interactions", ("--ahead", 0), "--ahead 0; expected 1 or more"),
    ("interactions", ("--batch-rows", 4), "Unrecognized options: --batch-rows"),
    ("interactions", ("--coefficients", 1, 2, 1), "each once"),
    ("interactions", ("--horizon", 4), "Unrecognized options: --horizon"),
    ("interactions", ("--latent", 3, -1), "numbered from 0"),
    ("interactions", ("--parts", "pears"), "--parts pears; known: pairs, matrix"),
    ("interactions", ("--per-token", 1), "--per-token 1; expected 2 or more"),
    ("interactions", ("--unit", "z"), "--unit z; known: "),
    ("plot_depth", ("--figures", "depth"), "no figure 'depth'; known: direction_norm_kl"),
    ("plot_depth", ("--figures", "win_rate"), "nothing to draw by depth: zoo: a SAEEvaluation has no figure by depth"),
    ("plot_depth", ("/nowhere",), "no folder"),
    ("plot_depth", ("{given}/saes",), "no result in"),
    ("report", ("/nowhere",), "no folder"),
    ("report", ("{given}/saes",), "no result in"),
    ("report", ("{given}/saes", "{given}/saes"), "given twice"),
    ("report", ("--out", "/nowhere/page.html"), "expected one to write page.html into"),
    ("show_latent", ("--atlas", "/nowhere"), "/nowhere holds no atlas"),
    ("show_latent", ("--latents", 40), "latent 40 does not exist; cosine has 40, from 0"),
    ("show_latent", ("--latents", "best:2"), "latent 'best:2'; expected a number"),
    ("show_latent", ("--latents", "top:2"), "give --atlas, or frequent:N"),
    ("show_latent", ("--latents",), "no latent"),
    ("show_latent", ("--sae", "no/such/sae"), "no SAE 'no/such/sae'"),
    ("show_latent", ("--top", 0), "--top 0"),
    ("specification_curve", ("--pair-sets", "random"), "--pair-sets"),
    ("specification_curve", ("--prompts", "boolq,boolq"), "two texts have the name 'boolq'"),
    ("train_sae", ("--d-sae", 0), "d_sae = 0; expected a positive number"),
    ("train_sae", ("--layers", -1), "layer -1 is negative"),
    ("train_sae", ("--reweight", 3), "reweight = 3"),
    ("train_sae", ("--saes", "standard:gate"), "no selector 'gate'; known: relu, topk, batchtopk"),
    ("train_sae", ("--saes", "standard", "standard"), "names one twice"),
    ("train_sae", ("--warm-up", 2), "warm_up = 2.0; expected a share of the run"),
    ("train_zoo", ("--only", "tiger"), "nothing in the zoo is called tiger; known: "),
    ("unit_norm", ("--context", "both"), "Unrecognized options: --context"),
    ("unit_norm", ("--horizon", 2), "Unrecognized options: --horizon"),
    ("unit_norm", ("--sites", "attn_out"), "Unrecognized options: --sites"),
    ("win_rate", ("--horizon", 4), "Unrecognized options: --horizon"),
    ("win_rate", ("--min-tokens", 1), "--min-tokens 1"),
    ("win_rate", ("--sampling", "all"), "--sampling all"),
]
"""What one command refuses: its name, words and message."""


@pytest.mark.parametrize(("name", "words", "message"), REFUSED)
def test_a_commands_own_options_are_checked_before_the_model_is_loaded(script, name, words, message, no_model):
    ended = script(name, *(str(word).format(given=script.given) for word in words))
    assert message in ended.error and ended.err.count("\n") == 1
    assert not ended.folder.is_dir() or not ended.files


NEEDS_THE_MODEL = [
    ("ablate_projections", ("--latents", 0), "0 latents, 30 tokens of each; ask for at least one"),
    ("dose_response", ("--doses", 0.1, 2.5), "doses [0.1, 2.5]; expected numbers above 0 and up to 2"),
    ("dose_response", ("--horizon", 2, "--context", "both"), "a single token has no later positions"),
    ("dose_response", ("--layers", 6), "no block 6 in a model of 6 blocks"),
    ("dose_response", ("--sink-filter", 1e-3), "none of 20 tokens is left"),
    ("dose_response", ("--tokens", 0), "0 tokens asked for"),
    ("eval_sae", ("{given}/saes/wide",), "width 16 for activations of width 32"),
    ("eval_sae", ("--n-prompts", 400), "expected 400"),
    ("eval_sae", ("--sink-filter", 1e-6), "no token is left at 1.resid_post"),
    (
        "patch_direction_norm",
        ("--context", "everywhere"),
        "no context 'everywhere'; known: in_place, single_token, both",
    ),
    ("patch_direction_norm", ("--layers", -1), "layer -1 is negative"),
    ("patch_direction_norm", ("--layers", 3, 30), "no block 30 in a model of 6 blocks; layers run from 0 to 5"),
    ("patch_direction_norm", ("--max-length", 1), "max_length 1"),
    ("patch_direction_norm", ("--model", "nobody/has-this-model"), "nobody/has-this-model"),
    ("patch_direction_norm", ("--n-prompts", 1), "1 prompt; "),
    ("patch_direction_norm", ("--pair-sets", "rand"), "no 'rand'; known: random, same_norm, high_cosine, scale_rotate"),
    ("patch_direction_norm", ("--pairs", 0), "0 pairs asked for"),
    ("patch_direction_norm", ("--pairs", 10**5), "tokens for 100000 pairs"),
    ("patch_direction_norm", ("--sink-filter", 1e-3), "none of 20 pairs is left, dropped: "),
    ("patch_direction_norm", ("--sites", "9.attn_out"), "no block 9 in a model of 6 blocks"),
    ("probe", ("--saes", "{given}/saes/wide"), "width 16 for activations of width 32"),
    ("train_sae", ("--batch-tokens", 0), "in batches of 0"),
    ("train_sae", ("--k", 49), "k = 49"),
    ("train_sae", ("--layers", 6), "no block 6 in a model of 6 blocks"),
    ("train_sae", ("--log-every", 0), "logged every 0"),
    ("train_sae", ("--saes", "standard:topk", "--k", 2.5), "k = 2.5 for TopK"),
    ("train_sae", ("--sink-filter", -1), "sink_filter -1.0"),
    ("train_sae", ("--tokens", 31), "1 SAEs on 31 tokens in batches of 32"),
    ("unit_norm", ("--layers", 6), "no block 6 in a model of 6 blocks"),
    ("unit_norm", ("--sink-filter", 1e-3), "is left, dropped"),
    ("unit_norm", ("--tokens", 0), "0 tokens asked for"),
]


@pytest.mark.parametrize(("name", "words", "message"), NEEDS_THE_MODEL)
def test_what_only_the_model_tells_is_refused_on_one_line_and_leaves_no_result(script, name, words, message):
    ended = script(name, *(str(word).format(given=script.given) for word in words))
    assert message in ended.error
    assert ended.files.keys() <= {"run.json", "metrics.jsonl"}


@pytest.mark.parametrize("name", IN_A_FOLDER)
def test_finished_results_stay_as_they_are_without_overwrite(script, name, help_of, options):
    """The same command goes on or is refused; another run is refused, and with --overwrite takes their place."""
    run = script.finished(name)
    assert "Traceback" not in run.err and "warning" not in run.err
    *table, wrote = run.said.rstrip("\n").split("\n")
    assert table and f"into {run.folder}" in wrote
    shutil.copytree(run.folder, script.folder / "out")
    before = run.files
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
    if "--model" in options(name):  # nothing says whose they are: refused before the model is loaded
        for path in script.folder.rglob("run.json"):
            path.unlink()
        assert "--overwrite" in script(name, "--model", "/nowhere/at/all").error
    replaced = script(name, *other, "--overwrite", "--json", "--quiet")
    assert (replaced.status, replaced.err) == (0, "")
    document = json.loads(replaced.said, parse_constant=lambda word: pytest.fail(word))
    for part in [document] if "files" in document else document.values():
        assert part["files"] and all((script.folder / part["out"] / file).is_file() for file in part["files"])
    assert {name: data for name, data in replaced.files.items() if name in before} != before
