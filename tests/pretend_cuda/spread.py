"""A tiny model over two pretended GPUs: the upper blocks, the final norm and the head on the second, as `device_map` spreads it."""

from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from tests.tiny import blocks, fresh


def spread(name: str, first_above: int = 3):
    """Blocks from `first_above` on, and what follows them, on cuda:1; accelerate's hooks carry inputs there and logits back."""
    hf = fresh(name, "cuda:0")
    core, skip = hf.base_model, getattr(hf, "_skip_keys_device_placement", None)
    lower = list(blocks(name, hf))[:first_above]
    modules = [m for m in (*core.children(), hf.get_output_embeddings()) if m is not blocks(name, hf)]
    after = [m for m in modules if "norm" in type(m).__name__.lower() or m is hf.get_output_embeddings()]
    for module in (*lower, *blocks(name, hf)[first_above:], *modules):
        device = "cuda:1" if module in after or module in blocks(name, hf)[first_above:] else "cuda:0"
        hook = AlignDevicesHook(execution_device=device, skip_keys=skip)
        add_hook_to_module(module.to(device), hook)
    add_hook_to_module(hf, AlignDevicesHook(execution_device="cuda:0", io_same_device=True, skip_keys=skip))
    return hf
