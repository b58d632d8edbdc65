"""The card of a latent, shown in a notebook or written as a page."""

from dataclasses import dataclass
from pathlib import Path

from diagnostics.cards.content import CardContent
from diagnostics.cards.page import card_html, page
from interventions.errors import count
from interventions.files import write_whole


@dataclass(frozen=True, repr=False)
class LatentCard(CardContent):
    """One latent of an SAE on a text: what `CardContent` holds, shown."""

    def __repr__(self) -> str:
        return f"LatentCard(latent {self.latent} of {self.sae} at {self.site}, fires on {self.n_active:,} of {count(self.n_tokens, 'token')})"

    def html(self) -> str:
        """The card as a page of its own, without any external resource."""
        return page(self)

    def write(self, path: str | Path) -> Path:
        """The page into a file."""
        path, text = Path(path), self.html()
        write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
        return path

    def _repr_html_(self) -> str:
        return card_html(self)
