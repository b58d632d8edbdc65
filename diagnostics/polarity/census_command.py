"""Count latents that take both signs on a text, beside random directions that fire as often."""

from dataclasses import dataclass

from diagnostics.commands import command
from diagnostics.commands.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt
from diagnostics.commands.sae_inputs import HeldOutTextOptions, SAEOptions
from interventions.errors import MechdiagError


@dataclass(frozen=True, kw_only=True)
class CensusOptions(command.OutputOptions, SAEOptions, HeldOutTextOptions):
    """How many latents take both signs?

    Counts, latent by latent, the tokens where z > 0 and where z < 0; a latent is bipolar if each takes at least 10 % of its firing.
    Beside SAEs with signed latents stand random directions that fire as often. Writes a table of latents and shares without each
    prompt (Parquet), a summary with provenance (JSON) and the figure into --out. Our reconstruction of the census of arXiv:2605.28149.

    Examples:
      scripts/bipolar_census.py --saes results/saes/15.mlp_out/abstopk-k32 --out results/census
    """

    n_prompts: PositiveInt = 200
    """prompts sampled from the text"""
    min_active: PositiveInt = 20
    """tokens on which a latent must fire to be counted"""
    sink_filter: NonNegativeFloat = 10.0
    """drop tokens with ||x|| above this many times the site's median at any site (0: keep them)"""
    seed: NonNegativeInt = 0
    """of prompts and random directions"""


def main(options: CensusOptions) -> command.Document:
    """Run the command."""
    from diagnostics.polarity.census import BipolarCensus, bipolar_census
    from interventions.files import claim_folder

    if not options.saes:
        raise MechdiagError("--saes is empty; name at least one")
    options.check_model()
    claim_folder(options.out, BipolarCensus.files(), options.overwrite)
    saes = options.load_saes()
    texts = options.texts(options.prompts)
    model = options.load_model()
    prompts = options.tokenized(texts, model, options.seed)
    how = options.named("min_active", "seed") | {"sink_filter": options.sink_filter or None}
    return options.measure("counting", "SAE", bipolar_census, model, prompts, saes, **how)


def run() -> None:
    """The command line of `scripts/bipolar_census.py`."""
    command.run(CensusOptions, main)
