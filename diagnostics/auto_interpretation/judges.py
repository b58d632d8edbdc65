"""Judges: what explains a latent from examples and says of snippets whether it is active; as functions and as commands."""

import json
import math
import shlex
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from interventions.errors import ResultError, one_line

Judge = Callable[[dict[str, Any]], Mapping[str, Any]]
"""Answers requests, dictionaries that JSON can hold, of two tasks:

    {"task": "explain", "examples": [{"tokens": [" the", …], "activations": [0.0, …]}, …]}  →  {"explanation": …}
    {"task": "score", "explanation": …, "snippets": [[" a", …], …]}                           →  {"scores": [0.9, …]}

activations: of each token, 0 where the latent is not active; strongest example first. explanation: anything that JSON can hold, given
back as it is. scores: a number for each snippet, larger where the latent is more likely active somewhere in it, ½ or more for "active".
"""
THRESHOLD = 0.5
BASELINE = "token frequency"


def token_frequency(request: dict[str, Any]) -> dict[str, Any]:
    """The baseline judge: no language model, only how often each token was active in the examples.

        explanation  a/(n + 1) of each token that was active, a its active occurrences, n all
        score        the largest of a snippet's tokens

    Source: ours.
    """
    if request["task"] == "explain":
        every: Counter[str] = Counter()
        active: Counter[str] = Counter()
        for example in request["examples"]:
            every.update(example["tokens"])
            active.update(t for t, z in zip(example["tokens"], example["activations"], strict=True) if z)
        return {"explanation": {token: n / (every[token] + 1) for token, n in active.items()}}
    known = request["explanation"]
    return {
        "scores": [max((known.get(token, 0.0) for token in snippet), default=0.0) for snippet in request["snippets"]]
    }


class CommandJudge:
    """A judge that is a command: one request a line on its standard input, one answer a line on its standard output, both JSON.

    It is started at the first request and serves all of them. `timeout`: seconds that it may take for one answer.
    Raises `ResultError` where it cannot be started, ends, takes too long, or its line is no JSON object.
    """

    def __init__(self, command: str, timeout: float = 600.0):
        self.command, self.timeout = command, timeout
        self._process: subprocess.Popen[str] | None = None
        self._errors: Any = None

    def __call__(self, request: dict[str, Any]) -> Mapping[str, Any]:
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        late = threading.Event()
        timer = threading.Timer(self.timeout, lambda: (late.set(), process.kill()))
        timer.start()
        try:
            process.stdin.write(json.dumps(request, ensure_ascii=False) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # it ended before it read the request
            line = ""
        finally:
            timer.cancel()
        if not line:
            raise self._ended(late.is_set())
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise ResultError(
                f"judge {self.command!r} answered {line[:60]!r}; expected a JSON object on one line"
            ) from error
        if not isinstance(answer, dict):
            raise ResultError(f"judge {self.command!r} answered {line[:60]!r}; expected a JSON object")
        return answer

    def _started(self) -> "subprocess.Popen[str]":
        if self._process is None:
            self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
            words = shlex.split(self.command)
            try:
                self._process = subprocess.Popen(
                    words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, encoding="utf-8"
                )
            except (OSError, IndexError) as error:
                self._errors.close()
                raise ResultError(
                    f"judge {self.command!r} cannot be started ({one_line(error)}); give a command"
                ) from error
        return self._process

    def _ended(self, late: bool) -> ResultError:
        assert self._process is not None
        status = self._process.wait()
        self._errors.seek(0)
        said = [line for line in self._errors.read().splitlines() if line.strip()][-1:]
        why = (
            f"gave no answer in {self.timeout:g} seconds" if late else f"ended with status {status} before it answered"
        )
        return ResultError(f"judge {self.command!r} {why}{f': {said[0].strip()[:200]}' if said else ''}")

    def close(self) -> None:
        """End the command."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                with suppress(OSError):  # what it did not read any more
                    if pipe is not None:
                        pipe.close()
            self._process.terminate()
            self._process.wait()
            self._errors.close()
            self._process = None

    def __reduce__(self) -> Any:
        return CommandJudge, (self.command, self.timeout)


def explanation_of(judge: Judge, name: str, examples: Sequence[Mapping[str, Any]]) -> Any:
    """The judge's explanation of some examples. Raises `ResultError` where it fails or gives none."""
    answer = _answer(judge, name, {"task": "explain", "examples": list(examples)})
    if "explanation" not in answer:
        raise ResultError(
            f"judge {name!r} answered {str(answer)[:60]} to task explain; expected an object with explanation"
        )
    return answer["explanation"]


def scores_of(judge: Judge, name: str, explanation: Any, snippets: Sequence[Sequence[str]]) -> list[float]:
    """The judge's score of each snippet. Raises `ResultError` where it fails, or not each has a finite number."""
    answer = _answer(
        judge, name, {"task": "score", "explanation": explanation, "snippets": [list(s) for s in snippets]}
    )
    scores: Any = answer.get("scores")
    good = isinstance(scores, Sequence) and not isinstance(scores, str) and len(scores) == len(snippets)
    if not good or not all(isinstance(s, int | float) and math.isfinite(s) for s in scores):
        raise ResultError(
            f"judge {name!r} answered {str(answer)[:60]} to task score; expected scores, {len(snippets)} finite numbers"
        )
    return [float(s) for s in scores]


def _answer(judge: Judge, name: str, request: dict[str, Any]) -> Mapping[str, Any]:
    try:
        answer = judge(request)
    except ResultError:
        raise
    except Exception as error:  # whatever a user's function raises
        raise ResultError(f"judge {name!r} failed on task {request['task']}: {one_line(error)}") from error
    if not isinstance(answer, Mapping):
        raise ResultError(
            f"judge {name!r} answered {str(answer)[:60]!r} to task {request['task']}; expected a dictionary"
        )
    return answer
