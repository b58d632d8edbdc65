"""A pytest plugin: the tests run on the pretended device. See `make test-pretend-cuda`.

python -m pytest -p tests.pretend_cuda.plugin --device cuda tests/interventions
"""

import pytest

from tests.pretend_cuda.device import compiler, pretended_cuda

_mode = pretended_cuda() if compiler() else None


def pytest_configure(config: pytest.Config) -> None:
    if _mode is None:
        pytest.exit("the pretended CUDA device needs a C++ compiler (c++, g++ or clang++)", returncode=2)
    _mode.__enter__()


def pytest_unconfigure(config: pytest.Config) -> None:
    if _mode is not None:
        _mode.__exit__(None, None, None)
