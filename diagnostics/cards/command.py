"""Cards of latents: when each fires, what it adds, what the model does without it, its neighbours; a page a latent."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from diagnostics.cards.choice import check_exist, parsed
from diagnostics.cards.page import index_page
from diagnostics.cards.run import latent_cards
from diagnostics.commands import command
from diagnostics.commands.inputs import ModelInputs, short_names
from diagnostics.commands.sae_inputs import HeldOutText
from interventions.errors import MechdiagError
from interventions.files import claim_folder, made, write_whole
from interventions.models.loading import resolve_device
from sae_models.loading import load_sae

if TYPE_CHECKING:
    from diagnostics.atlas.result import CausalAtlas


INDEX = "index.html"


@dataclass(frozen=True, kw_only=True)
class CardOptions(command.Output, ModelInputs, HeldOutText):
    """What is this latent?

    Writes a self-contained HTML page for each latent: the texts on which it fires, coloured by token; histograms of its activation and of
    the norms on which it fires; what its decoder direction says of the next token; the exact effect of removing it, token by token, beside
    matched placebos; its nearest latents in other SAEs. Several latents get an index.html too.

    Examples:
      scripts/latent_card.py --sae smollm2-135m/15/cosine --latents 12 345 --out results/cards
      scripts/latent_card.py --sae smollm2-135m/15/standard --latents top:5 \\
          --atlas results/atlas --compare smollm2-135m/15/cosine --out results/cards
    """

    sae: str
    """a folder or file, a name in the zoo, or hf:owner/name/folder"""
    latents: tuple[str, ...]
    """numbers; or top:5, those of the largest summed effect at the even prompts of the --atlas (their effects are then shown of the other
    prompts, since those that chose them would flatter them); or frequent:5, those that fire most often"""
    atlas: Path | None = None
    """folder of a causal atlas of this model, SAE and text"""
    compare: tuple[str, ...] = ()
    """other SAEs of the model whose latents are compared"""
    top: int = 12
    """texts with the largest |z|"""
    few: int = 4
    """texts from the upper quarter of |z|, and from around its median"""
    context_tokens: int = 40
    """tokens shown of each text"""
    effects: int = 256
    """active tokens, drawn uniformly, whose effects and placebos are measured"""
    sink_filter: float = 10.0
    """leave out tokens with ||x|| above this many times the site's median (0: keep them)"""
    path: str = "auto"
    """auto (replay, checked against full forward passes), replay, or hooks (full forward passes)"""
    seed: int = 0
    """of prompts, tokens drawn and placebos"""
    out: Path
    """folder for the pages"""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """replace cards that are in --out already"""

    def check(self) -> None:
        """What can be wrong without a model. Raises `MechdiagError`."""
        if self.path not in ("auto", "replay", "hooks"):
            raise MechdiagError(f"unknown path {self.path!r}; known: auto, replay, hooks")
        asked = [parsed(word) for word in self.latents]
        if (kinds := {kind for kind, _ in asked}) & {"top"} and self.atlas is None:
            raise MechdiagError("top:N asks for the largest effects of an atlas; give --atlas, or frequent:N")
        self.check_share()
        if self.sink_filter < 0:
            raise MechdiagError(f"--sink-filter {self.sink_filter}; expected a number from 0")
        if min(self.top, self.few, self.context_tokens, self.effects) < 1:
            raise MechdiagError(
                f"--top {self.top}, --few {self.few}, --context-tokens {self.context_tokens}, --effects {self.effects}; expected at least 1"
            )
        self.check_model()
        pages = [page_name(n) for kind, n in asked if not kind]
        made(self.out)
        if kinds != {""}:  # which pages these will be is known once all are made: too late to refuse
            pages += sorted(path.name for path in self.out.glob(page_name("*")))
        claim_folder(self.out, self.index + pages, self.overwrite)

    @property
    def index(self) -> list[str]:
        """The index page, where more is asked for than one latent by its number."""
        return [INDEX] if len(self.latents) != 1 or parsed(self.latents[0])[0] else []


def page_name(latent: int | str) -> str:
    """The file of a latent's card, or of `*` the pattern of all."""
    return f"latent_{latent}.html"


def main(settings: CardOptions) -> command.Document:
    """Everything that can be wrong with the input is looked at before the model runs."""
    settings.check()
    name, *other_names = short_names((settings.sae, *settings.compare))
    device = resolve_device(settings.device)
    sae, *others = (load_sae(path, device=device) for path in (settings.sae, *settings.compare))
    check_exist(settings.latents, name, sae.d_sae)
    atlas = None if settings.atlas is None else _atlas(settings.atlas)
    texts = settings.texts(settings.prompts)
    model = settings.load_model()
    prompts = settings.tokenized(texts, model, settings.seed)
    with settings.progress("cards", unit="latent") as progress:
        cards = latent_cards(
            model,
            sae,
            settings.latents,
            prompts,
            atlas=atlas,
            others=dict(zip(other_names, others, strict=True)),
            name=name,
            top=settings.top,
            few=settings.few,
            context_tokens=settings.context_tokens,
            n_effects=settings.effects,
            sink_filter=settings.sink_filter or None,
            seed=settings.seed,
            path=settings.path,
            progress=progress,
        )
    files = {card.latent: page_name(card.latent) for card in cards}
    index = settings.index
    folder = claim_folder(settings.out, [*files.values(), *index], settings.overwrite)
    for card in cards:
        card.write(folder / files[card.latent])
        settings.say(card.line())
    if index:
        text = index_page(cards, files)
        write_whole(folder / INDEX, lambda path: path.write_text(text, encoding="utf-8"))
    written = [*files.values(), *index]
    settings.say(f"wrote {', '.join(written)} into {folder}")
    said = [{"latent": card.latent, "line": card.line(), "provenance": card.provenance} for card in cards]
    return {"cards": said, "out": str(folder), "files": written}


def _atlas(folder: Path) -> "CausalAtlas":
    from diagnostics.atlas.result import CausalAtlas
    from diagnostics.results.result import load_result

    return load_result(CausalAtlas, folder)


def run() -> None:
    """The command line of `scripts/latent_card.py`."""
    command.run(CardOptions, main)
