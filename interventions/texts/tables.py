"""Rows of CSV and JSONL files, each with its place, and nothing cut off, filled in or taken twice."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from interventions.errors import TextError, one_line


def read_text(path: Path) -> str:
    """A UTF-8 file, without a byte order mark. Raises `TextError` for one that cannot be read, and for NULs, which no text has."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror or one_line(error)}") from error
    if "\0" in content:
        line = content[: content.index("\0")].count("\n") + 1
        raise TextError(
            f"{path}, line {line}: a NUL, as in UTF-16 or in a file of numbers; expected text, saved as UTF-8"
        )
    return content


def csv_rows(path: Path, content: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Place and fields of each row, by the names in the first; blank lines are left out.

    Raises `TextError`, with the line, for a row of more or fewer fields than there are names, a name that stands twice, and
    what is no CSV.
    """
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    limit = csv.field_size_limit(max(len(content), csv.field_size_limit()))  # a field may be the whole file
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise TextError(f"{path}, line {reader.line_num}: not CSV ({error}); expected a header and rows") from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        return
    (first, names), *rows = rows
    if twice := [name for name, n in Counter(names).items() if n > 1 and name]:
        raise TextError(
            f"{path}, line {first}: {len(names)} columns, of which {twice[0]!r} stands twice; name each once"
        )
    for line, row in rows:
        if len(row) != len(names):
            raise TextError(
                f"{path}, line {line}: {len(row)} fields for {len(names)} columns ({', '.join(map(repr, names))}); expected one "
                "each: put a field that holds commas or line breaks in double quotes"
            )
        yield f"{path}, line {line}", dict(zip(names, row, strict=True))


def json_rows(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    """Place and value of each line that is not blank. Raises `TextError`, with the line, for what is no JSON, or has a name twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            name = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise TextError(f"{place}: {name!r} stands twice in an object; name each field once")
        return found

    for number, line in enumerate(
        content.split("\n"), 1
    ):  # splitlines would also cut at U+2028, which JSON strings may hold
        place = f"{path}, line {number}"
        if line.strip():
            try:
                value = json.loads(line, object_pairs_hook=once)
            except TextError:
                raise
            except (ValueError, RecursionError) as error:  # deeply nested; a number of more digits than Python reads
                said = getattr(error, "msg", None) or one_line(error)
                raise TextError(f"{place}: not JSON ({said}); expected one object a line") from error
            yield place, value
