"""What `diagnostics` exports: each name from its module, at its first use."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import diagnostics


def test_type_checkers_and_runtime_see_the_same_names():
    tree = ast.parse(Path(str(diagnostics.__file__)).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    stated = {a.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert stated == {name: f"diagnostics.{home}" for name, home in diagnostics._HOMES.items()}
    assert sorted(stated) == diagnostics.__all__
    assert set(stated) <= set(dir(diagnostics))


@pytest.mark.parametrize("name", diagnostics.__all__)
def test_exported_names_come_from_their_modules(name):
    home = import_module(f"diagnostics.{diagnostics._HOMES[name]}")
    assert getattr(diagnostics, name) is getattr(home, name)
    assert getattr(diagnostics, name).__module__ == home.__name__


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'direction_nrom'"):
        diagnostics.direction_nrom  # noqa: B018


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, diagnostics; sys.exit(any(name in sys.modules for name in ('torch', 'pandas', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=60).returncode == 0
