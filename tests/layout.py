"""The layout of the packages: which module imports which, on how many floors, without a circle or an import that runs back up.

python -m tests.layout
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("interventions", "sae_models", "diagnostics", "mechdiag")
"""From the ground up: each imports only those before it."""
SHARED = ("statistics", "sampling", "pairs", "figures", "results", "running", "commands")
"""Folders of `diagnostics` that the questions share."""
ACROSS = ("reports", "by_depth")
"""Folders of `diagnostics` that show results of every question, and import none."""
WIDEST = 20
"""modules in one folder"""

Imports = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """Every module of the packages by its dotted name; a package's `__init__` bears the package's name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(known: Mapping[str, Path]) -> Imports:
    """What each module imports of the others: at its top, inside functions, and for type checking alone.

    `from package import name` is an import of the module that `name` comes from: packages only hand names on, so their `__init__` are
    followed, not counted.
    """
    packages = {name for name, path in known.items() if path.name == "__init__.py"}
    named = {name: dict(_imported(ast.parse(known[name].read_text(encoding="utf-8")))) for name in packages}
    found: Imports = {}
    for name, path in known.items():
        if name in packages:
            continue
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for module, what in _targets(node):
                target = f"{module}.{what}" if what and f"{module}.{what}" in known else module
                while target in packages and what in named[target]:
                    target = named[target][what]
                if target in packages:
                    found[name] |= {home for home in named[target].values() if home in known}
                elif target in known:
                    found[name].add(target)
        found[name].discard(name)
    return found


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((alias.asname or alias.name, node.module) for alias in node.names)


def _targets(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.ImportFrom) and node.module:
        yield from ((node.module, alias.name) for alias in node.names)
    elif isinstance(node, ast.Import):
        yield from ((alias.name, "") for alias in node.names)


def rooms(graph: Imports) -> Imports:
    """The same between folders; a module that stands beside folders is a room of its own."""
    found: Imports = {}
    for name, targets in graph.items():
        own = found.setdefault(room(name), set())
        own |= {room(target) for target in targets} - {room(name)}
    return found


def room(module: str) -> str:
    """The folder below a package that a module stands in, or the module itself."""
    parts = module.split(".")
    return ".".join(parts[:2])


def circles(graph: Imports) -> list[list[str]]:
    """Sets of modules that import each other in a loop (strongly connected components of more than one)."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(start: str, edges: Mapping[str, Iterable[str]], out: list[str]) -> None:
        stack = [(start, iter(sorted(edges.get(start, ()))))]
        seen.add(start)
        while stack:
            node, rest = stack[-1]
            step = next((other for other in rest if other not in seen), None)
            if step is None:
                stack.pop()
                out.append(node)
            else:
                seen.add(step)
                stack.append((step, iter(sorted(edges.get(step, ())))))

    for node in sorted(graph):
        if node not in seen:
            visit(node, graph, order)
    back: Imports = {}
    for node, targets in graph.items():
        for target in targets:
            back.setdefault(target, set()).add(node)
    seen.clear()
    found = []
    for node in reversed(order):
        if node not in seen:
            one: list[str] = []
            visit(node, back, one)
            found += [sorted(one)] if len(one) > 1 else []
    return found


def floors(graph: Imports) -> dict[str, int]:
    """The floor of each module: 1 where it imports none of the others, else one above the highest that it imports."""
    found: dict[str, int] = {}

    def floor(node: str) -> int:
        if node not in found:
            found[node] = 1 + max(map(floor, graph.get(node, ())), default=0)
        return found[node]

    for node in graph:
        floor(node)
    return found


def upward(graph: Imports) -> list[str]:
    """Imports that run against the order of the house: packages, what questions share, questions, pages across results, the front."""
    return sorted(f"{a} -> {b}" for a, targets in graph.items() for b in targets if _story(a) < _story(b))


def _story(module: str) -> float:
    parts = module.split(".")
    if parts[0] != "diagnostics":
        return PACKAGES.index(parts[0])
    if parts[1] in SHARED:
        return 2 + SHARED.index(parts[1]) / 10
    return {"saved": 4.5}.get(parts[1], 5 if parts[1] in ACROSS else 4)


def drawing(module: str) -> bool:
    """Whether a module draws: it takes frames, groups and provenance, and knows neither results nor the engine."""
    return module.startswith("diagnostics.figures.") or module.rsplit(".", 1)[-1] in ("figures", "charts", "panels")


def widths(known: Mapping[str, Path]) -> Counter[str]:
    """How many modules each folder holds."""
    return Counter(path.parent.relative_to(ROOT).as_posix() for path in known.values() if path.name != "__init__.py")


def main() -> int:
    """Print the figures, and every circle and upward import; the exit status says whether there are any."""
    known = modules()
    graph = imports(known)
    between, wide = rooms(graph), widths(known)
    found = [*circles(graph), *circles(between)]
    up = upward(graph)
    heights = (max(floors(g).values()) if not circles(g) else "-" for g in (graph, between))
    print("modules {}, rooms {}, floors of modules {}, of rooms {}".format(len(graph), len(between), *heights))
    print(
        f"circles {len(found)}, upward imports {len(up)}, widest folder {max(wide.values())} ({wide.most_common(1)[0][0]})"
    )
    for one in found:
        print("circle:", ", ".join(one))
    for one in up:
        print("upward:", one)
    return int(bool(found or up or max(wide.values()) > WIDEST))


if __name__ == "__main__":
    sys.exit(main())
