"""The baseline judge by hand; a command as a judge, and how each failure is told in one line."""

import pickle
import sys
from contextlib import closing

import pytest

from diagnostics.auto_interpretation.judges import CommandJudge, explanation_of, scores_of, token_frequency
from interventions import ResultError

EXAMPLES = [{"tokens": ["a", "b", "a"], "activations": [0.0, 2.0, 1.0]}, {"tokens": ["b"], "activations": [1.0]}]
ECHO = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["task"] == "explain":
        print(json.dumps({"explanation": [request["examples"][0]["tokens"][1], "é"]}), flush=True)
    else:
        word = request["explanation"][0]
        print(json.dumps({"scores": [float(word in snippet) for snippet in request["snippets"]]}), flush=True)
"""


def command(tmp_path, code: str, timeout: float = 20.0) -> CommandJudge:
    path = tmp_path / "judge.py"
    path.write_text(code)
    return CommandJudge(f"'{sys.executable}' '{path}'", timeout)


def test_token_frequency_by_hand():
    explanation = explanation_of(token_frequency, "x", EXAMPLES)
    assert explanation == {"a": 1 / 3, "b": 2 / 3}
    assert scores_of(token_frequency, "x", explanation, [["c", "b"], ["a", "c"], ["c"], []]) == [2 / 3, 1 / 3, 0, 0]


def test_command_answers_line_by_line(tmp_path):
    with closing(command(tmp_path, ECHO)) as judge:
        other = pickle.loads(pickle.dumps(judge))  # for workers: a process of its own
        with closing(other):
            for some in (judge, other):
                explanation = explanation_of(some, "x", EXAMPLES)
                assert explanation == ["b", "é"]
                assert scores_of(some, "x", explanation, [["b"], ["a"]]) == [1.0, 0.0]
        assert judge._process.poll() is None  # one process for all requests


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit('no key')", "ended with status 1 before it answered: no key"),
        ("import time; time.sleep(30)", "gave no answer in 0.5 seconds"),
        ("print('hello', flush=True); input(); input()", "answered 'hello.*; expected a JSON object on one line"),
        ("print('[1]', flush=True); input(); input()", "answered .*; expected a JSON object"),
        ("print('{}', flush=True); input(); input()", "to task explain; expected an object with explanation"),
    ],
)
def test_failing_command_raises_on_one_line(tmp_path, code, said):
    with closing(command(tmp_path, code, timeout=0.5 if "sleep" in code else 20.0)) as judge:
        with pytest.raises(ResultError, match=said) as error:
            explanation_of(judge, "mine", EXAMPLES)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("scores", [[1.0], [1.0, float("nan")], "ab", None, [1.0, "x"]])
def test_malformed_scores_raise(scores):
    with pytest.raises(ResultError, match="expected scores, 2 finite numbers"):
        scores_of(lambda request: {"scores": scores}, "mine", "", [["a"], ["b"]])


def test_failing_function_and_missing_command_raise():
    def judge(request):
        raise KeyError("quota")

    with pytest.raises(ResultError, match="judge 'mine' failed on task explain: KeyError: 'quota'"):
        explanation_of(judge, "mine", EXAMPLES)
    with pytest.raises(ResultError, match="cannot be started"):
        explanation_of(CommandJudge("/nowhere/judge"), "mine", EXAMPLES)
