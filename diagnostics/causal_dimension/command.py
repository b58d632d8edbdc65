"""Count the directions of an activation that the model above it reads, by depth, beside random models and the activations themselves."""

from dataclasses import dataclass

from diagnostics.commands import command
from diagnostics.commands.inputs import NullRunOptions
from diagnostics.commands.ranges import NonNegativeInt, PositiveInt
from diagnostics.commands.sae_inputs import named_saes
from interventions.errors import MechdiagError
from interventions.sites import POINTS, Site


@dataclass(frozen=True, kw_only=True)
class CausalDimensionOptions(NullRunOptions):
    """How many directions of an activation does the model above the site read?

    The effective rank of E[J^T M J], J the Jacobian of the next-token log-probabilities in the activation, M the Fisher metric
    of p, or the vocabulary-centred logits; with the participation ratio and the directions that hold 50, 80 and 90 % of the trace.
    Beside it the same tokens' matrices turned at random, the covariance of the activations and randomly initialised models.
    Writes tables (Parquet), the tokens, a summary with provenance (JSON) and figures into --out.

    Examples:
      scripts/causal_dimension.py --layers 7 15 22 --null-model random --out results/kappa
      scripts/causal_dimension.py --layers 15 --saes standard --out results/kappa_spans
    """

    sites: tuple[str, ...] = ("resid_post",)
    """where: resid_pre, attn_out, resid_mid, mlp_out, resid_post of every block in --layers, or single sites such as 15.attn_out"""
    tokens: PositiveInt = 60
    """tokens, the same at every site; each costs as many rows as there are directions"""
    directions: NonNegativeInt = 0
    """0: all of d_model; a number: a sketch by so many random directions, for wide models"""
    saes: tuple[str, ...] = ()
    """SAEs at these sites, by kind, name or folder: what share of the trace lies in spans of their decoder rows"""
    spans: tuple[PositiveInt, ...] = ()
    """numbers of decoder rows (default: 16 64 256)"""

    def check(self, files: tuple[str, ...]) -> None:
        for name in self.sites:
            if name not in POINTS:
                Site.parse(name)
        if self.saes and self.directions:
            raise MechdiagError("shares of the trace need every direction; leave out --saes, or --directions")
        if self.saes and not self.layers:
            raise MechdiagError("--saes needs --layers: the blocks of these SAEs")
        super().check(files)

    def places(self, n_layers: int) -> list[Site]:
        """Sites: points of every layer, and single sites."""
        from diagnostics.running.clean import default_layers

        layers = list(self.layers) or default_layers(n_layers)
        points = [name for name in self.sites if name in POINTS]
        single = [Site.parse(name) for name in self.sites if name not in POINTS]
        return [Site(layer, point) for point in points for layer in layers] + single


def main(options: CausalDimensionOptions) -> command.Document:
    """Run the command."""
    from diagnostics.causal_dimension.result import CausalDimension
    from diagnostics.causal_dimension.run import causal_dimensionality
    from diagnostics.results.result import result_files
    from interventions.models.loading import resolve_device

    options.check(result_files(CausalDimension))
    saes = (
        named_saes(options.saes, options.layers, options.model, resolve_device(options.device))
        if options.saes
        else None
    )
    model, prompts = options.load()
    how = options.common() | options.named("tokens", "spans")
    how |= {"sites": options.places(model.n_layers), "directions": options.directions or None, "saes": saes}
    return options.measure("multiplying Jacobians", "row", causal_dimensionality, model, prompts, **how)


def run() -> None:
    """The command line of `scripts/causal_dimension.py`."""
    command.run(CausalDimensionOptions, main)
