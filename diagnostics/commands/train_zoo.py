"""The zoo: real SAEs of the packaged model at three depths, from one pass over the packaged text."""

from dataclasses import dataclass
from pathlib import Path

from diagnostics.commands import command
from sae_models.loading import saved_sae
from sae_models.training.zoo import TOKENS, package_zoo, train_zoo, zoo_folder


@dataclass(frozen=True, kw_only=True)
class ZooOptions(command.Spoken):
    """Trains the SAEs of the zoo that are not in the cache folder yet; interrupted, the same command goes on.

    standard, cosine (base + delta), cosine-global, bypass and aligned BatchTopK SAEs of SmolLM2-135M at blocks 7, 15 and 22 (2,304
    latents, k = 32), three seeds of the first two at block 15; for load_sae("smollm2-135m/15/cosine") and every command.

    Examples:
      scripts/train_zoo.py --only 15/aligned
      scripts/train_zoo.py --only standard cosine
    """

    only: tuple[str, ...] = ()
    """names (15/cosine), layers (15) or architectures (cosine); default: all"""
    tokens: int = TOKENS
    """tokens each is trained on"""
    device: str | None = None
    """cpu, cuda, cuda:1 (default: cuda where there is one)"""
    package: Path | None = None
    """also write those that the package carries into this folder, in half precision"""


def main(settings: ZooOptions) -> command.Document:
    """Train what is missing and print what there is."""
    with settings.progress("training the zoo", unit="step") as progress:
        names = train_zoo(settings.only, tokens=settings.tokens, device=settings.device, progress=progress)
    found = {}
    for name in names:
        said = saved_sae(zoo_folder() / name).metadata["training"]
        found[name] = said
        settings.say(f"{name:20} FVE {said['fve']:.3f}   L0 {said['l0']:5.1f}   dead {said['dead']:.1%}")
    settings.say(f"{len(names)} SAEs in {zoo_folder()}")
    if settings.package is not None:
        settings.say(f"wrote {len(package_zoo(settings.package))} of them into {settings.package}")
    return {"saes": found, "out": str(zoo_folder()), "files": names}


def run() -> None:
    """The command line of `scripts/train_zoo.py`."""
    command.run(ZooOptions, main)
