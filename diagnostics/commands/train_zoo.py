"""Training of the zoo: SAEs of the packaged model at three depths, from one pass over the packaged text."""

from dataclasses import dataclass
from pathlib import Path

from diagnostics.commands import command
from diagnostics.commands.ranges import PositiveInt
from diagnostics.commands.train_sae import say_training
from interventions.errors import count


@dataclass(frozen=True, kw_only=True)
class ZooOptions(command.CommonOptions):
    """Trains the SAEs of the zoo that are not in the cache folder yet; after an interruption the same command goes on.

    standard, cosine (base + delta), cosine-global, bypass and aligned BatchTopK SAEs of SmolLM2-135M at blocks 7, 15 and 22 (2,304
    latents, k = 32), three seeds of the first two at block 15; for load_sae("smollm2-135m/15/cosine") and every command.

    Examples:
      scripts/train_zoo.py --only 15/aligned
      scripts/train_zoo.py --only standard cosine
    """

    only: tuple[str, ...] = ()
    """names (15/cosine), layers (15) or architectures (cosine); default: all"""
    tokens: PositiveInt | None = None
    """training tokens of each (default: 1,048,576)"""
    device: str | None = None
    """cpu, cuda, cuda:1 (default: cuda if available)"""
    package: Path | None = None
    """also write the SAEs that the package includes into this folder, in half precision"""


def main(options: ZooOptions) -> command.Document:
    """Train the missing SAEs and print all that --only names."""
    from sae_models.loading import saved_sae
    from sae_models.training.zoo import package_zoo, train_zoo, zoo_folder

    with options.progress("training the zoo", unit="step") as progress:
        given = {} if options.tokens is None else {"tokens": options.tokens}
        names = train_zoo(options.only, device=options.device, progress=progress, **given)
    found = {name: saved_sae(zoo_folder() / name).metadata["training"] for name in names}
    say_training(options, found)
    options.say(f"{count(len(names), 'SAE')} in {zoo_folder()}")
    if options.package is not None:
        options.say(f"wrote {len(package_zoo(options.package))} of them into {options.package}")
    return {"saes": found, "out": str(zoo_folder()), "files": names}


def run() -> None:
    """The command line of `scripts/train_zoo.py`."""
    command.run(ZooOptions, main)
