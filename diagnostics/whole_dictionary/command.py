"""The options of `scripts/atlas.py` for whole dictionaries, and what it does with --all-latents."""

from dataclasses import dataclass

from diagnostics.commands import command
from diagnostics.commands.ranges import NonNegativeInt, PositiveInt
from diagnostics.commands.sae_inputs import SAERunOptions


@dataclass(frozen=True, kw_only=True)
class AllLatentsOptions(SAERunOptions):
    """Options of a command that can measure every latent of SAEs."""

    n_prompts: NonNegativeInt = 0
    """prompts sampled from the text (default 0: 160, or with --all-latents as many as hold --scan-tokens)"""
    all_latents: bool = False
    """measure every latent of the SAEs at some of its tokens, in place of every token; without scores"""
    tokens_per_latent: PositiveInt = 100
    """with --all-latents: active tokens of each latent, as many from each quarter of its |z|; those that fire less often are counted"""
    scan_tokens: PositiveInt = 300_000
    """with --all-latents: tokens of the text that are read at most"""


def main(options: AllLatentsOptions) -> command.Document:
    """Run the command with --all-latents."""
    from diagnostics.results.result import result_files
    from diagnostics.whole_dictionary.result import DictionaryEffects
    from diagnostics.whole_dictionary.run import dictionary_effects

    options.check(result_files(DictionaryEffects))
    saes = options.load_saes()
    model, prompts = options.load()
    options.say("one pass over the text, then edits are counted")
    how = options.common() | options.named("tokens_per_latent", "scan_tokens")
    return options.measure("removing", "edit", dictionary_effects, model, prompts, saes, **how)
