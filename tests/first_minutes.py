"""What the first ten minutes cost: README's words and lines, the start of commands, the width of pages; each beside its limit.

python -m tests.first_minutes                  measures and prints; exits with 1 where a limit is passed
python -m tests.first_minutes snippet          prints README's first Python block as a script that shows its last line
python -m tests.first_minutes compare OUTPUT   compares a file with the output that README shows below that block

Only the standard library, so that the Python of an empty environment runs it.
"""

import ast
import difflib
import math
import re
import resource
import subprocess
import sys
from itertools import dropwhile
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORDS, LINES = 750, 120
"""of README"""
PAGES = "build/docs"
MAIN = "from mechdiag.command import main; main()"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?")


def snippet(readme: str) -> str:
    """README's first Python block; an expression on its last line is printed, as a notebook or a prompt would.

    Ends with exit code 1 where there is none.
    """
    code = _first_python(readme)[0][1]
    last = ast.parse(code).body[-1]
    if isinstance(last, ast.Expr) and not (
        isinstance(last.value, ast.Call) and ast.unparse(last.value.func) == "print"
    ):
        lines = code.splitlines()[: last.lineno - 1]
        code = "\n".join([*lines, f"print(repr({ast.unparse(last)}))", ""])
    return code


def output(readme: str) -> str:
    """The text block that follows README's first Python block, before any other. Ends with exit code 1 where there is none."""
    match _first_python(readme):
        case [_, ("text", shown), *_]:
            return shown
    raise SystemExit("README shows no output: expected a ```text block below its first ```python block")


def _first_python(readme: str) -> list[tuple[str, str]]:
    """Language and code of README's blocks, from the first of Python on."""
    blocks = BLOCK.findall(readme)
    found = list(dropwhile(lambda block: block[0] != "python", blocks))
    if not found:
        raise SystemExit("README has no ```python block")
    return found


def differences(shown: str, printed: str) -> list[str]:
    """Lines of a diff where two outputs differ: words must be the same; numbers within 1 %, or one unit of their last digit.

    White space does not count. Another processor may round the last digit otherwise.
    """
    shown, printed = (re.sub(r"(?<=\d),(?=\d{3})", "", text) for text in (shown, printed))
    words = [" ".join(NUMBER.sub("#", text).split()) for text in (shown, printed)]
    numbers = [NUMBER.findall(text) for text in (shown, printed)]
    if words[0] == words[1] and all(map(_close, *numbers)):
        return []
    return list(difflib.unified_diff(shown.splitlines(), printed.splitlines(), "README", "printed", lineterm=""))


def _close(a: str, b: str) -> bool:
    digits = len(a.partition("e")[0].partition(".")[2])
    unit = 10.0 ** (int(a.partition("e")[2] or 0) - digits)
    return math.isclose(float(a), float(b), rel_tol=0.01, abs_tol=1.01 * unit)


def cpu_seconds(*words: str, repeats: int = 3) -> float:
    """The least CPU time of some runs of this Python: the first run also compiles. Output is thrown away."""
    found = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(found)


def measures() -> list[tuple[str, float, float, str]]:
    """What, its value, its limit, its unit."""
    from mechdiag.command import COMMANDS

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [name for group in COMMANDS.values() for name in group]
    helps = {name: cpu_seconds("-c", MAIN, name, "--help", repeats=2) for name in commands}
    errors = {name: cpu_seconds("-c", MAIN, name, "--no-such-option", repeats=2) for name in commands}
    slow_help, slow_error = max(helps, key=helps.__getitem__), max(errors, key=errors.__getitem__)
    return [
        ("README", len(readme.split()), WORDS, "words"),
        ("README", len(readme.splitlines()), LINES, "lines"),
        ("mechdiag --help", cpu_seconds("-c", MAIN, "--help"), 0.5, "s of CPU"),
        (f"slowest --help of {len(helps)} ({slow_help})", helps[slow_help], 0.5, "s of CPU"),
        ("import mechdiag", cpu_seconds("-c", "import mechdiag"), 0.3, "s of CPU"),
        (f"slowest error in an option ({slow_error})", errors[slow_error], 0.7, "s of CPU"),
    ]


def main() -> int:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    match sys.argv[1:]:
        case ["snippet"]:
            print(snippet(readme), end="")
            return 0
        case ["compare", path]:
            found = differences(output(readme), Path(path).read_text(encoding="utf-8"))
            print("\n".join(found) or "README's output is what its snippet prints")
            return bool(found)
        case []:
            passed = 0
            for what, value, limit, unit in measures():
                passed += value > limit
                print(f"{what:50}{value:8.4g} of {limit:g} {unit}{'  OVER' if value > limit else ''}", flush=True)
            if not (ROOT / PAGES).is_dir():
                print(f"no pages in {PAGES}, so no widths; run: make docs")
            elif (ROOT / "tests" / "widths.py").exists():
                passed += subprocess.run([sys.executable, "-m", "tests.widths", PAGES], cwd=ROOT).returncode != 0
            return bool(passed)
        case words:
            print(f"error: unknown words {words}; expected nothing, snippet, or compare FILE", file=sys.stderr)
            return 2


if __name__ == "__main__":
    raise SystemExit(main())
