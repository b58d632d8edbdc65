"""The wheel holds every module, template and packaged SAE, and needs nothing of the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.layout import PACKAGES, ROOT, modules

IMPORT_ALL = """
import importlib, sys
for name in sys.stdin.read().split():
    module = importlib.import_module(name)
    assert module.__file__.startswith(sys.argv[1]), (name, module.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists() and (name.split("/")[0] in PACKAGES or "/" not in name):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run(pip, check=True, timeout=120)
    [built] = folder.glob("*.whl")
    return built


@pytest.mark.long
def test_every_module_of_the_wheel_imports(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = [sys.executable, "-c", IMPORT_ALL, str(tmp_path)]
    env = {"PYTHONPATH": str(tmp_path), "PATH": "", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "HOME": str(tmp_path)}
    names = "\n".join(modules())
    done = subprocess.run(code, input=names, text=True, cwd=tmp_path, env=env, timeout=120, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr


def test_data_files_are_in_the_wheel(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    data = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert data and data <= held


@pytest.mark.model
def test_first_minutes_run_from_the_wheel(wheel):
    """README's snippet prints what README shows, and commands start, from the wheel alone, outside the checkout."""
    script = [ROOT / "tests" / "first_ten_minutes.sh", "--quick", wheel]
    done = subprocess.run(
        script, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
