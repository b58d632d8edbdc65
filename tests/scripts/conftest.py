"""What tests of commands share: a tiny model and a text in a folder, and the command as a user types it."""

import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from tests.tiny import prompts, tiny_model, tokenizer


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a model of random weights, its tokenizer, and a text of 24 paragraphs."""
    folder = tmp_path_factory.mktemp("given")
    tiny_model("llama").save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    lengths = tuple(14 + (7 * i) % 11 for i in range(24))
    texts = [" ".join(f"w{i}" for i in ids) for ids in prompts(lengths)]
    for name, some in (("text", texts), ("other", [" ".join(reversed(t.split())) for t in texts])):
        (folder / f"{name}.txt").write_text("\n\n".join(some) + "\n")
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made, and their files hold nothing: drawing takes longer than all else, and has tests of its own."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **how: Path(path).write_bytes(b"not drawn"))
    monkeypatch.setattr(Figure, "draw_without_rendering", lambda self: None)


@pytest.fixture
def run(script, given, monkeypatch, capsys):
    """The command of `script`, in this process: (exit status, what it said, what went to stderr)."""

    def command(*words: object, model: bool = True) -> tuple[int, str, str]:
        some = ["--model", given / "model", "--prompts", given / "text.txt", "--n-prompts", 24, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, [*words, *(some if model else [])])])
        status = 0
        with warnings.catch_warnings():  # a command shows warnings in its own way
            try:
                script.command.run(script.Settings, script.main)
            except SystemExit as ended:
                status = ended.code
        plt.close("all")
        said = capsys.readouterr()
        return status, said.out, said.err

    return command
