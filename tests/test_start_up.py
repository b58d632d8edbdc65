"""What a command imports before it works: nothing heavy for its help, for an error in its options, or for `import`."""

import subprocess
import sys

import pytest

from tests.layout import ROOT

HEAVY = {
    "torch",
    "transformers",
    "transformer_lens",
    "nnsight",
    "numpy",
    "pandas",
    "scipy",
    "sklearn",
    "matplotlib",
    "pyarrow",
    "ray",
}
COMMANDS = sorted(path for path in (ROOT / "scripts").glob("*.py") if not path.name.startswith("bench_"))
RUN = """
import contextlib, io, runpy, sys
for path in sys.argv[2:]:
    sys.argv = [path, sys.argv[1]]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        runpy.run_path(path, run_name="__main__")
    print(path, *sorted(set({heavy}) & set(sys.modules)))
"""


@pytest.mark.parametrize("words", ["--help", "--no-such-option"])
def test_commands_start_without_heavy_imports(words):
    code = RUN.replace("{heavy}", repr(HEAVY))
    done = subprocess.run(
        [sys.executable, "-c", code, words, *map(str, COMMANDS)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()] == [[str(path)] for path in COMMANDS]


@pytest.mark.parametrize("name", ["interventions", "sae_models", "diagnostics", "mechdiag"])
def test_packages_are_imported_without_heavy_imports(name):
    code = f"import sys, {name}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
