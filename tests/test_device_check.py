"""The check that runs on a machine with a GPU, dry: on the CPU, with tiny shapes."""

import json
import sys

import pytest
import torch

from tests import device_check
from tests.device_check import SECTIONS, Check


@pytest.mark.long
def test_every_section_runs_on_tiny_shapes(tmp_path):
    check = Check("cpu", tiny=True, seconds=600, out=tmp_path)
    with torch.no_grad():
        for name, (_, section) in SECTIONS.items():
            if name != "tests":
                check.run(name, 0, section)
    assert check.failed == []
    found = json.loads((tmp_path / "device_check.json").read_text())
    assert set(found) == {*SECTIONS, "table"} - {"tests"}
    assert all(entry["path"] == "replay" for key, entry in found["parity"].items() if "GPU" not in key)
    assert all(found[name]["kl, 5 edits a token"]["rows_per_s"] > 0 for name in SECTIONS if name.startswith("bench"))


def test_failed_or_skipped_sections_do_not_stop_the_check(tmp_path):
    check = Check("cpu", tiny=True, seconds=100, out=tmp_path)
    check.run("first", 0, lambda _: 1 / 0)
    check.run("second", 1000, lambda _: 1)
    check.run("third", 0, lambda _: {"a": 1})
    found = json.loads((tmp_path / "device_check.json").read_text())
    assert check.failed == ["first: ZeroDivisionError: division by zero"]
    assert found["third"] == {"a": 1} and "second" not in found and "left out" in check.table[1]


def test_without_a_gpu_exits_2_with_a_message(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(sys, "argv", ["device_check"])
    assert device_check.main() == 2
    assert "sees no GPU" in capsys.readouterr().err
