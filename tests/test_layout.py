"""The house: floors without circles, one folder a question, drawing apart from results and engine."""

import pytest

import diagnostics
import interventions
import sae_models
from tests import layout

KNOWN = layout.modules()
GRAPH = layout.imports(KNOWN)
QUESTIONS = sorted(
    path.name
    for path in (layout.ROOT / "diagnostics").iterdir()
    if (path / "__init__.py").exists() and path.name not in (*layout.SHARED, *layout.ACROSS)
)


def test_no_circular_imports_between_modules_or_folders():
    assert layout.circles(GRAPH) == []
    assert layout.circles(layout.rooms(GRAPH)) == []


def test_no_import_runs_upward():
    assert layout.upward(GRAPH) == []


def test_circles_and_upward_imports_are_found():
    loop = {
        "interventions.a": {"sae_models.b"},
        "sae_models.b": {"diagnostics.c.d"},
        "diagnostics.c.d": {"interventions.a"},
    }
    assert layout.circles(loop) == [["diagnostics.c.d", "interventions.a", "sae_models.b"]]
    assert layout.upward(loop) == ["interventions.a -> sae_models.b", "sae_models.b -> diagnostics.c.d"]
    assert layout.floors({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": 3, "b": 2, "c": 1}


def test_imports_inside_functions_and_for_type_checking_count(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "ROOT", tmp_path)
    for package in layout.PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "interventions" / "__init__.py").write_text("from interventions.a import A\n")
    (tmp_path / "interventions" / "a.py").write_text("def f():\n    from sae_models import b\n")
    (tmp_path / "sae_models" / "b.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from interventions import A\n"
    )
    found = layout.imports(layout.modules())
    assert found == {"interventions.a": {"sae_models.b"}, "sae_models.b": {"interventions.a"}}


def test_drawing_modules_import_neither_results_nor_engine():
    allowed = {"interventions.errors", "interventions.files", "interventions.sites"}
    wrong = [
        f"{module} -> {target}"
        for module, targets in GRAPH.items()
        if layout.drawing(module)
        for target in targets
        if (target.split(".")[0] != "diagnostics" and target not in allowed)
        or target.rsplit(".", 1)[-1] in ("result", "run")
    ]
    assert wrong == []


def test_folders_are_small_and_diagnostics_has_one_module():
    assert max(layout.widths(KNOWN).values()) <= layout.WIDEST
    assert sorted(path.name for path in (layout.ROOT / "diagnostics").glob("*.py")) == ["__init__.py", "saved.py"]


def test_no_folder_has_the_name_of_a_public_object():
    public = {*diagnostics.__all__, *interventions.__all__, *sae_models.__all__}
    folders = {path.parent.name for path in KNOWN.values()}
    assert not public & folders


@pytest.mark.parametrize("question", QUESTIONS)
def test_each_diagnostic_has_the_usual_files_and_a_docstring(question):
    folder = layout.ROOT / "diagnostics" / question
    assert (folder / "command.py").exists()
    assert any(name.startswith("diagnostics." + question) and name.endswith(("figures", "charts")) for name in KNOWN)
    source = (folder / "__init__.py").read_text(encoding="utf-8")
    assert source.startswith('"""') and source.rstrip().endswith('"""')
