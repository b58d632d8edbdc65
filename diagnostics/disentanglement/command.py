"""Exchange one attribute of an entity through a few latents: does it change, and do the others stay?"""

from dataclasses import dataclass
from pathlib import Path

from diagnostics.commands import command
from diagnostics.commands.inputs import ReplayPath
from diagnostics.commands.ranges import NonNegativeInt, PositiveInt
from diagnostics.commands.sae_inputs import SAEOptions
from diagnostics.disentanglement.choices import KS
from interventions.errors import MechdiagError


@dataclass(frozen=True, kw_only=True)
class DisentangleOptions(command.ResumableOptions, SAEOptions):
    """Can one attribute of an entity be changed through an SAE's latents while the others stay?

    Exchanges k latents between two entities (countries) at the entity's last token, and asks for the exchanged attribute (cause) and the
    others (isolation). Latents are chosen on one half of the entities and measured on the other. Beside them: random latents at the same
    dose, principal components, the subspace that gradients read, all latents, the whole activation. Writes a table (Parquet), its
    prompts, a summary with provenance (JSON) and a figure into --out.

    Examples:
      scripts/disentangle.py --layers 15 --saes standard cosine --out results/disentangle
      scripts/disentangle.py --facts mine.csv --questions mine_questions.csv --out results/mine
    """

    facts: Path | None = None
    """.csv with a column entity and one for each attribute (default: packaged; countries: capital, continent, language)"""
    questions: Path | None = None
    """.csv with columns context, attribute, template; {} stands for the entity, the template ends before the value"""
    ks: tuple[PositiveInt, ...] = KS
    """numbers of latents or directions exchanged"""
    pairs: PositiveInt = 40
    """pairs of entities measured in each half, at most"""
    learn: NonNegativeInt = 0
    """steps of gradient descent for a learned mask of latents and a learned subspace (0: none; 40 double the time)"""
    seed: NonNegativeInt = 0
    """of halves, pairs and random latents"""
    batch_rows: PositiveInt | None = None
    """tokens in one forward pass (default: 512 on the CPU, on a GPU up to 4096 by its memory); halved when memory runs out"""
    path: ReplayPath = "auto"
    """auto (replay, checked against full forward passes), replay, or hooks (full forward passes)"""

    def check(self) -> None:
        """Validate options before loading the model. Raises `MechdiagError`."""
        from diagnostics.disentanglement.result import Disentanglement
        from interventions.files import claim_run

        if not self.saes or not self.ks:
            raise MechdiagError("no SAE or no number of latents; name at least one of each")
        if (self.facts is None) != (self.questions is None):
            raise MechdiagError("--facts and --questions belong together; give both, or neither for the packaged ones")
        self.check_model()
        claim_run(self.out, Disentanglement.files(), self.overwrite)


def main(options: DisentangleOptions) -> command.Document:
    """Run the command."""
    from diagnostics.disentanglement.facts import load_facts
    from diagnostics.disentanglement.run import disentangle

    options.check()
    facts = load_facts(options.facts, options.questions)
    saes = options.load_saes()
    how = options.named("ks", "pairs", "learn", "seed", "batch_rows", "path", "overwrite") | {"folder": options.out}
    return options.measure("exchanging", "row", disentangle, options.load_model(), saes, facts, **how)


def run() -> None:
    """The command line of `scripts/disentangle.py`."""
    command.run(DisentangleOptions, main)
