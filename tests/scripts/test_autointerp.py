"""`autointerp.py` with the baseline and with a command as judge; a judge that fails is one line and costs no finished latent."""

import sys

import pytest

from diagnostics.auto_interpretation.judges import BASELINE
from diagnostics.auto_interpretation.result import AutoInterp

JUDGE = """
import json, sys
for n, line in enumerate(sys.stdin):
    request = json.loads(line)
    if n == LIMIT:
        sys.exit("no credit left")
    answer = {"explanation": "x"} if request["task"] == "explain" else {"scores": [0.5] * len(request["snippets"])}
    print(json.dumps(answer), flush=True)
"""


def test_baseline_and_command_judges_run_and_resume(script, tmp_path):
    found = AutoInterp.load(script.finished("autointerp").folder)
    assert set(found.frame["judge"]) == {BASELINE} and set(found.frame["of"]) == {"own", "shuffled"}
    judge = tmp_path / "judge.py"
    command = f"'{sys.executable}' '{judge}'"
    judge.write_text(JUDGE.replace("LIMIT", "7"))
    out = tmp_path / "out"
    run = script("autointerp", "--judge", command, "--out", out)
    assert run.error == f"judge {command!r} ended with status 1 before it answered: no credit left"
    assert len(list((out / "units").glob("*.parquet"))) == 6  # five explanations, one latent's scores
    judge.write_text(JUDGE.replace("LIMIT", "-1"))
    run = script("autointerp", "--judge", command, "--out", out)
    assert run.status == 0, run.err
    mine = AutoInterp.load(run.folder).frame.query("judge != @BASELINE")
    assert (mine["auc"] == 0.5).all() and mine["judge"].unique().tolist() == [command]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--judge", "/nowhere/judge"), "judge '/nowhere/judge' cannot be started"),
        (("--latents", 1), "--latents"),
        (("--snippets", 0), "--snippets"),
    ],
)
def test_invalid_input_exits_2_with_one_line(script, words, said):
    assert said in script("autointerp", *words).error
