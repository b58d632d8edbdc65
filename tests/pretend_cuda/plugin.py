"""A pytest plugin: tests that take `device` run on the pretended one, the last case of each. See `make test-pretend-cuda`.

python -m pytest -p tests.pretend_cuda.plugin --device cuda tests/interventions
"""

import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pretend_cuda.device import ROOT, compiler, pretended_cuda

_CANNOT = re.compile("Cannot access accelerator device|with arguments from the 'CUDA' backend")
_SLOW = ("test_logits_of_a_large_vocabulary_are_exact_in_parts", "test_unsupported_models_fall_back_to_full_forwards")
_OF_PLAIN_WEIGHTS = "test_logit_differences_compute_only_the_needed_logits"
"""Weights of the pretended device are of a class of their own."""
_mode = pretended_cuda() if compiler() else None


def pytest_configure(config: pytest.Config) -> None:
    if _mode is None:
        pytest.exit("the pretended CUDA device needs a C++ compiler (c++, g++ or clang++)", returncode=2)
    _mode.__enter__()


def pytest_unconfigure(config: pytest.Config) -> None:
    if _mode is not None:
        _mode.__exit__(None, None, None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The last case of each test that takes a device; every test of the device itself."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        name = item.nodeid.split("[")[0]
        if "device" in getattr(item, "fixturenames", ()) and not name.endswith((*_SLOW, _OF_PLAIN_WEIGHTS)):
            cases.setdefault(name, []).append(item)
    chosen = {id(item) for several in cases.values() for item in several[-1:]}
    chosen |= {id(item) for item in items if item.path.parent.name == "pretend_cuda"}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
    items[:] = [item for item in items if id(item) in chosen]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test that itself does what the pretended device cannot is skipped; where code of the packages does it, the test fails."""
    try:
        return (yield)
    except (RuntimeError, NotImplementedError) as error:
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        own = [
            f for f in files if f.startswith(str(ROOT)) and not {"pretend_cuda", "site-packages"} & set(Path(f).parts)
        ]
        if _CANNOT.search(str(error)) and own and own[-1].startswith(str(ROOT / "tests")):
            pytest.skip("gradients, and lists as indices, are handled by the real CUDA alone")
        raise
