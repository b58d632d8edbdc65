"""Ctrl-C at any moment of a call, and what of the model it could leave behind."""

import ast
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

PACKAGE = Path(__file__).parents[1] / "interventions"


def left_on(*models: nn.Module) -> dict[str, Any]:
    """All that a call could leave on models: hooks of every kind, replaced forwards, flags, the way they attend."""
    found: dict[str, Any] = {"grad": torch.is_grad_enabled()}
    for n, model in enumerate(models):
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                if "hook" in key and isinstance(value, (dict, list)):
                    found[f"{n} {name} {key}"] = len(value)
            found[f"{n} {name}"] = module.training, vars(module).get("forward"), module.__class__
            if hasattr(module, "config"):
                found[f"{n} {name} attention"] = getattr(module.config, "_attn_implementation", None)
            for key, value in module.named_parameters(recurse=False):
                found[f"{n} {name}.{key}"] = value.requires_grad, value._version
    return found


@contextmanager
def at_module(moment: int, seen: list[str] | None = None) -> Iterator[None]:
    """KeyboardInterrupt as the `moment`-th module begins its forward pass, whatever model it is of; `seen`: who began one."""
    count = 0

    def begin(module: nn.Module, _: Any) -> None:
        nonlocal count
        count += 1
        if seen is not None:
            seen.append(type(module).__name__)
        if count == moment:
            raise KeyboardInterrupt

    handle = nn.modules.module.register_module_forward_pre_hook(begin)
    try:
        yield
    finally:
        handle.remove()


Line = tuple[str, str, int]
"""File, function, number."""


@contextmanager
def at_line(wanted: Line | None, seen: set[Line] | None = None) -> Iterator[None]:
    """KeyboardInterrupt as a line of the package runs for the first time; `seen`: the lines that ran."""
    folder, before, due = str(PACKAGE), sys.gettrace(), True

    def line(frame: FrameType, event: str, _: Any) -> Callable | None:
        nonlocal due
        if event == "line":
            at = os.path.basename(frame.f_code.co_filename), frame.f_code.co_name, frame.f_lineno
            if seen is not None:
                seen.add(at)
            if due and at == wanted:
                due = False
                raise KeyboardInterrupt
        return line

    def call(frame: FrameType, event: str, _: Any) -> Callable | None:
        code = frame.f_code  # only the wanted function is traced line by line, which is slow
        here = code.co_filename.startswith(folder) and (seen is not None or (wanted and code.co_name == wanted[1]))
        return line if here else None

    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)


def restoring() -> set[Line]:
    """Lines of `finally` blocks. A tracer can raise before what is put back; Python looks for signals only as a function of its own
    begins, after a call and at a loop's end, so Ctrl-C can hardly come there."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                blocks = [node.finalbody for node in ast.walk(function) if isinstance(node, ast.Try)]
                nodes = [
                    inner for block in blocks for node in block for inner in ast.walk(node) if hasattr(inner, "lineno")
                ]
                found |= {(file.name, function.name, node.lineno) for node in nodes}
    return found
