"""What every test shares: shapes and types checked at run time, and a device to run on."""

import os
import signal
import sys

import beartype  # noqa: F401  (before nnsight, which patches types in a way that beartype cannot be imported after)
import hypothesis
import jaxtyping
import pytest
import torch

# Before anything of the package is imported: from here on every annotated function checks its tensors' shapes.
# An int stands for a float, as everywhere in Python's typing.
_CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
jaxtyping.install_import_hook(["interventions", "sae_models"], _CHECKER)
_jaxtyped = jaxtyping.jaxtyped


def _checked(*, typechecker):
    """What the hook writes above every function. One made within another, at each call anew, would be compiled each time,
    a quarter of the tests' time: it is checked where a shape stands in its annotations."""

    def checked(given):
        inner = "<locals>" in getattr(given, "__qualname__", "")
        if inner and "jaxtyping" not in str(getattr(given, "__annotations__", {})):
            return given
        return _jaxtyped(given, typechecker=typechecker)

    return checked


jaxtyping.jaxtyped = _checked

# Kernels run by Triton's interpreter where there is no GPU. Triton asks when it is first imported, whoever imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A job in the background starts with SIGINT ignored, and its children with it; tests of Ctrl-C must not depend on that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Timing decides no test, and a test that passed once passes again.
hypothesis.settings.register_profile("mechdiag", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("mechdiag")


def pytest_configure(config: pytest.Config) -> None:
    """Without the lock a third party's deprecation is shown; it is an error only where one of our own lines causes it."""
    if os.environ.get("MECHDIAG_UNLOCKED"):
        for kind in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
            config.addinivalue_line("filterwarnings", f"default::{kind}")
            config.addinivalue_line(
                "filterwarnings", rf"error::{kind}:(interventions|sae_models|diagnostics|scripts)\b"
            )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests put tensors and models: cpu (default), cuda, cuda:1")


@pytest.fixture(autouse=True)
def _figures_closed():
    """pyplot keeps every figure until it is closed, and warns of more than 20."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models gain nothing from threads, and threads that wait for each other on a busy machine cost minutes."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device of this run; the test is skipped where it asks for a GPU and there is none."""
    name = str(request.config.getoption("--device"))
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip(f"--device {name}: this torch sees no GPU")
    return name


@pytest.fixture(scope="session")
def pool():
    """Two workers on Ray."""
    import tempfile
    from pathlib import Path

    from diagnostics.running.ray_pool import RayPool

    found = RayPool(2, None, 1, False)
    yield found
    left = list(Path(tempfile.gettempdir()).glob(f"mechdiag-ray-{os.getpid()}-*"))
    assert bool(left) == bool(found.workers)
    found.close()
    assert not any(path.exists() for path in left)
