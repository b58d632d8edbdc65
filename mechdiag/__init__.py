"""The public names of the toolkit, from one place: `from mechdiag import load_model, direction_norm, load_sae`.

Each is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import diagnostics
import interventions
import sae_models

if TYPE_CHECKING:
    from diagnostics import *  # noqa: F403
    from interventions import *  # noqa: F403
    from sae_models import *  # noqa: F403

    __version__: str

__all__ = ["__version__"]
__all__ += interventions.__all__
__all__ += sae_models.__all__
__all__ += diagnostics.__all__


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("mechdiag")
    for package in (interventions, sae_models, diagnostics):
        if name in package.__all__:
            return getattr(package, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
