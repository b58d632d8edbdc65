"""`docs/extending.md` adds a question: its five files, written into a copy as the page shows them, work."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import layout
from tests.tiny import prompts, tiny_model, tokenizer

ROOT = layout.ROOT
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = re.findall(r"^\*\*`(\S+)`\*\*.*?^```(python|diff)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
"""(path, language, code) in the order of the page"""
RUN = """
import runpy, sys
from diagnostics import report, saved_results
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
result = saved_results(sys.argv[-1])["out"]
assert type(result).__name__ == "MeanAblation"
page = report({"mine": result})
assert result.QUESTION.split("'")[0] in page and "mean ÷ placebo" in page and "<img" in page
g = result.select(model="trained", layer=4)[0]
assert g["placebo"].low < g["placebo"].value < g["placebo"].high and g["mean ÷ placebo"].value > 0
selves = result.frame.kl[result.frame.edit == "self"]
edited = result.frame[result.frame.edit != "self"].pivot(index=["model", "layer", "token"], columns="edit", values=["delta_norm", "kl"])
assert selves.abs().max() < 1e-5 < edited.kl.min().min()
assert (edited.delta_norm["mean"] - edited.delta_norm.placebo).abs().max() < 1e-4  # the placebo moves x as far
assert len(result.frame) > 100
"""
"""The command, then what must hold of its result."""


def applied(source: str, diff: str) -> str:
    """The source with the lines that a diff adds, each after the line above it, or in place of that marked `-`; context must be there once."""
    lines = source.splitlines()
    for mark, line in ((line[:1], line[1:]) for line in diff.splitlines()):
        if mark == "+":
            at += 1
            lines.insert(at, line)
        else:
            assert lines.count(line) == 1, line
            at = lines.index(line)
            if mark == "-":
                del lines[at]
                at -= 1
    return "\n".join([*lines, ""])


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A copy of the diagnostics with the question that the page adds."""
    folder = tmp_path_factory.mktemp("house")
    shutil.copytree(ROOT / "diagnostics", folder / "diagnostics", ignore=shutil.ignore_patterns("__pycache__"))
    for package in ("interventions", "sae_models"):
        (folder / package).symlink_to(ROOT / package)
    for name, language, code in FILES:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            applied(path.read_text(encoding="utf-8"), code) if language == "diff" else code, encoding="utf-8"
        )
    return folder


def test_a_question_takes_five_files_and_sixty_lines():
    added = [
        line
        for _, language, code in FILES
        for line in code.splitlines()
        if line.strip() and (language == "python" or line.startswith("+"))
    ]
    assert len({name for name, _, _ in FILES}) == len(FILES) == 5
    assert len(added) <= 60


def test_new_diagnostic_follows_the_import_rules(house, monkeypatch):
    monkeypatch.setattr(layout, "ROOT", house)
    graph = layout.imports(layout.modules())
    assert "diagnostics.running.token_edits" in graph["diagnostics.mean_ablation.run"]
    assert layout.circles(graph) == layout.upward(graph) == layout.circles(layout.rooms(graph)) == []


@pytest.mark.long
def test_new_command_runs_and_its_result_is_reported(house, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(
        "\n\n".join(" ".join(f"w{j}" for j in ids) for ids in prompts((12,) * 24)), encoding="utf-8"
    )
    words = (
        house / "scripts" / "mean_ablation.py", "--model", "model", "--device", "cpu", "--prompts", "text.txt",
        "--n-prompts", 24, "--layers", 1, 4, "--sink-filter", 0, "--null-model", "random", "--null-seeds", 1, "--out", "out",
    )  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(house), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    argv = [sys.executable, "-W", "error", "-c", RUN, *map(str, words)]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mean ÷ placebo" in done.stdout and "mean_ablation.png" in done.stdout
