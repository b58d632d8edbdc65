"""Write cards of latents: when each fires, what it adds, what the model does without it, its nearest latents; one page each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from diagnostics.commands import command
from diagnostics.commands.inputs import ReplayPath
from diagnostics.commands.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt
from diagnostics.commands.sae_inputs import HeldOutTextOptions, SAEOptions, sae_paths, saes_at
from interventions.errors import MechdiagError

if TYPE_CHECKING:
    from diagnostics.cards.atlas_rows import Atlas

INDEX = "index.html"


@dataclass(frozen=True, kw_only=True)
class CardOptions(command.OutputOptions, SAEOptions, HeldOutTextOptions):
    """What is this latent?

    Writes a self-contained HTML page for each latent: the texts on which it fires, coloured by token; histograms of its activation and of
    the norms on which it fires; its decoder direction's logits; the exact effect of removing it, token by token, beside matched controls
    (placebos); its nearest latents in other SAEs. Several latents also get an index.html.

    Examples:
      scripts/latent_card.py --saes smollm2-135m/15/cosine --latents 12 345 --out results/cards
      scripts/latent_card.py --saes smollm2-135m/15/standard --latents top:5 \\
          --atlas results/atlas --compare smollm2-135m/15/cosine --out results/cards
    """

    saes: tuple[str, ...] = field()
    """one SAE: a folder or file, a name in the zoo, hf:owner/name/folder, or a kind of SAE in the packaged zoo, such as cosine, of --layers"""
    latents: tuple[str, ...]
    """numbers; or top:5, those of the largest summed effect at the even prompts of the --atlas (effects are then shown at the other
    prompts, to avoid selection bias); or frequent:5, those that fire most often"""
    atlas: Path | None = None
    """folder of a causal atlas, or of the effects of a whole dictionary, of this model, SAE and text"""
    compare: tuple[str, ...] = ()
    """other SAEs of the model, whose latents are compared, named like those of --saes"""
    top: PositiveInt = 12
    """texts with the largest |z|"""
    few: PositiveInt = 4
    """texts from the upper quarter of |z|, and from around its median"""
    context_tokens: PositiveInt = 40
    """tokens shown of each text"""
    effects: PositiveInt = 256
    """active tokens, sampled uniformly, at which effects and placebos are measured"""
    sink_filter: NonNegativeFloat = 10.0
    """drop tokens with ||x|| above this many times the site's median (0: keep them)"""
    path: ReplayPath = "auto"
    """auto (replay, checked against full forward passes), replay, or hooks (full forward passes)"""
    seed: NonNegativeInt = 0
    """of prompts, sampled tokens and placebos"""
    out: Path
    """folder for the pages"""
    overwrite: bool = False
    """replace cards that are already in --out"""

    def check(self) -> None:
        """Validate options before loading the model. Raises `MechdiagError`."""
        from diagnostics.cards.choice import parsed
        from interventions.files import claim_folder, made

        if len(paths := sae_paths(self.saes, self.layers, self.model)) != 1:
            raise MechdiagError(
                f"--saes names {len(paths)} SAEs, {', '.join(paths)}; expected one, whose latents are shown: give others with --compare"
            )
        asked = [parsed(word) for word in self.latents]
        if (kinds := {kind for kind, _ in asked}) & {"top"} and self.atlas is None:
            raise MechdiagError("top:N asks for the largest effects of an atlas; give --atlas, or frequent:N")
        self.check_model()
        pages = [page_name(n) for kind, n in asked if not kind]
        made(self.out)
        if kinds != {""}:  # their pages are known only after measuring, which is too late to refuse
            pages += sorted(path.name for path in self.out.glob(page_name("*")))
        claim_folder(self.out, self.index + pages, self.overwrite)

    @property
    def index(self) -> list[str]:
        """The index page, unless the command asks for a single latent by number."""
        from diagnostics.cards.choice import parsed

        return [INDEX] if len(self.latents) != 1 or parsed(self.latents[0])[0] else []


def page_name(latent: int | str) -> str:
    """The file of a latent's card; of `*`, the pattern of all."""
    return f"latent_{latent}.html"


def main(options: CardOptions) -> command.Document:
    """Run the command."""
    from diagnostics.cards.choice import check_exist
    from diagnostics.cards.page import index_page
    from diagnostics.cards.run import latent_cards
    from interventions.files import claim_folder, write_whole
    from interventions.models.loading import resolve_device

    options.check()
    paths = sae_paths((*options.saes, *options.compare), options.layers, options.model)
    (name, sae), *others = saes_at(paths, resolve_device(options.device)).items()
    check_exist(options.latents, name, sae.d_sae)
    atlas = None if options.atlas is None else _atlas(options.atlas)
    texts = options.texts(options.prompts)
    model = options.load_model()
    prompts = options.tokenized(texts, model, options.seed)
    with options.progress("cards", unit="latent") as progress:
        cards = latent_cards(
            model,
            sae,
            options.latents,
            prompts,
            atlas=atlas,
            others=dict(others),
            name=name,
            n_effects=options.effects,
            progress=progress,
            **options.named("top", "few", "context_tokens", "sink_filter", "seed", "path"),
        )
    files = {card.latent: page_name(card.latent) for card in cards}
    written = [*files.values(), *options.index]
    folder = claim_folder(options.out, written, options.overwrite)
    for card in cards:
        card.write(folder / files[card.latent])
        options.say(card.line())
    if options.index:
        text = index_page(cards, files)
        write_whole(folder / INDEX, lambda path: path.write_text(text, encoding="utf-8"))
    options.say(f"wrote {', '.join(written)} into {folder}")
    said = [{"latent": card.latent, "line": card.line(), "provenance": card.provenance} for card in cards]
    return {"cards": said, "out": str(folder), "files": written}


def _atlas(folder: Path) -> Atlas:
    from diagnostics.atlas.result import CausalAtlas
    from diagnostics.results.result import load_result
    from diagnostics.whole_dictionary.result import DictionaryEffects

    whole = (folder / f"{DictionaryEffects.NAME}.json").exists()
    return load_result(DictionaryEffects, folder) if whole else load_result(CausalAtlas, folder)


def run() -> None:
    """The command line of `scripts/latent_card.py`."""
    command.run(CardOptions, main)
