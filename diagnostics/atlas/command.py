"""The causal atlas: every active latent of every token ablated once, exactly, beside the cheap scores that estimate its effect; or, of
whole dictionaries, every latent at some of its tokens."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from diagnostics.commands import command
from diagnostics.commands.ranges import PositiveInt, Share
from diagnostics.whole_dictionary.command import AllLatentsOptions
from interventions.errors import MechdiagError

N_PROMPTS = 160
_OF_EVERY_TOKEN, _OF_ALL_LATENTS = (
    ("path_share", "steps", "samples", "placebo_share"),
    ("tokens_per_latent", "scan_tokens"),
)
"""options without, and with --all-latents"""


@dataclass(frozen=True, kw_only=True)
class AtlasOptions(AllLatentsOptions):
    """What does ablating each active latent of an SAE at each token do, and which cheap attribution can be trusted?

    Subtracts z_i d_i, the SAE's error kept, for every latent active at every token, and measures KL(clean || ablated) in nats, its
    direct part and the most likely token, beside activation, dose, angle, direct logit attribution, gradient attribution, integrated
    gradients, a sampled Fisher form and the exact second order of KL. Writes the table in shards (Parquet, --out/atlas), its tokens, schema and summary with
    provenance (JSON) and the figures of calibration and of draws. After an interruption the same command goes on.

    With --all-latents: what does removing each latent of whole dictionaries do, and is it more than its dose? One pass over the text
    counts how often each latent fires and draws --tokens-per-latent tokens of each, whose ablations and placebos are measured. Writes
    rows (partitioned Parquet, --out/rows), a table of latents with intervals and verdicts (latents.parquet), and a figure.

    Examples:
      scripts/atlas.py --layers 15 --out results/atlas
      scripts/atlas.py --all-latents --saes standard cosine --layers 15 --out results/dictionary15
      scripts/atlas.py --results results/atlas7 results/atlas15 --out results/atlases
    """

    results: tuple[Path, ...] = ()
    """join these finished folders of atlases (of other SAEs, or depths) into one, and ablate nothing"""

    saes: tuple[str, ...] = ("standard",)
    """folders, files, names in the zoo, hf:owner/name/folder; or kinds of SAE in the packaged zoo, such as cosine, one for each of --layers"""
    path_share: Share = 0.1
    """share of the tokens that also get integrated gradients, the sampled Fisher form and exact second order; scores are compared on these.
    Exact second order costs 2.4 times the ablations of these tokens: with .1 a quarter more in all"""
    steps: PositiveInt = 6
    """points on the path of integrated gradients"""
    samples: PositiveInt = 4
    """next tokens sampled for the Fisher form"""
    placebo_share: Share = 0.05
    """share of the rows that also get a random edit of the same norm and angle"""

    def check(self, files: tuple[str, ...]) -> None:
        from interventions.files import claim_folder

        if self.results and self.all_latents:
            raise MechdiagError("--results joins atlases; it does not go with --all-latents")
        of_other = _OF_EVERY_TOKEN if self.all_latents else _OF_ALL_LATENTS
        given = [f.name for f in fields(self) if f.name in of_other and getattr(self, f.name) != f.default]
        if given:
            option = f"--{given[0].replace('_', '-')}"
            raise MechdiagError(
                f"{option} does nothing {'with' if self.all_latents else 'without'} --all-latents; leave it out"
            )
        if self.results:
            if self.out.resolve() in {folder.resolve() for folder in self.results}:
                raise MechdiagError(f"--out {self.out} is one of --results; name another folder")
            claim_folder(self.out, (*files, "run.json"), self.overwrite)
        super().check(files)


def main(options: AtlasOptions) -> command.Document:
    """Run the command."""
    from diagnostics.atlas.result import CausalAtlas
    from diagnostics.atlas.run import causal_atlas
    from diagnostics.results.result import load_result
    from diagnostics.whole_dictionary import command as whole_dictionary

    if options.all_latents:
        return whole_dictionary.main(options)
    options.check(CausalAtlas.files())
    options = replace(options, n_prompts=options.n_prompts or N_PROMPTS)
    if options.results:
        joined = CausalAtlas.joined([load_result(CausalAtlas, folder) for folder in options.results])
        return options.finish(joined, options.out)
    saes = options.load_saes()
    how = options.common() | options.named("path_share", "steps", "samples", "placebo_share")
    return options.measure("ablating", "token", causal_atlas, *options.load(), saes, **how)


def run() -> None:
    """The command line of `scripts/atlas.py`."""
    command.run(AtlasOptions, main)
