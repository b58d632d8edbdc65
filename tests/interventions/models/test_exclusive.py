"""Passes run in eval mode and outside autocast, one thread at a time, and leave everything as it was."""

import threading

import pytest
import torch

from interventions import ModelError, Site, measure, record, wrap
from interventions.models.exclusive import exclusive, hooked
from tests.tiny import bridge, edited, fresh, prompts, rows

SITE = Site(2)


def setting(hf):
    recording = record(hf, prompts(), [SITE])
    prompt, position = rows()
    return recording, prompt, position, edited(recording, SITE, prompt, position)


@pytest.mark.parametrize("path", ["replay", "hooks"])
def test_dropout_is_off_and_train_mode_is_restored(path):
    expected = measure(*_at(setting(fresh("gpt2"))), path=path)["kl"]
    hf = fresh("gpt2")
    hf.train()
    hf.transformer.h[3].eval()
    modes = [module.training for module in hf.modules()]
    recording, prompt, position, vectors = setting(hf)
    found = measure(recording, SITE, prompt, position, vectors, path=path)["kl"]
    assert torch.equal(found, expected)
    clean = recording.at(SITE, prompt, position)
    assert measure(recording, SITE, prompt, position, clean, path=path)["kl"].max() < 1e-9
    assert [module.training for module in hf.modules()] == modes


def test_train_mode_is_restored_after_an_error():
    hf = fresh("gpt2").train()
    hf.transformer.h[3].eval()
    modes = [module.training for module in hf.modules()]
    recording, prompt, position, _ = setting(hf)

    def broken(_):
        assert not any(module.training for module in hf.modules())
        raise ArithmeticError

    for path in ("replay", "hooks"):
        with pytest.raises(ArithmeticError):
            measure(recording, SITE, prompt, position, broken, path=path)
        assert [module.training for module in hf.modules()] == modes
    handle = hf.transformer.h[2].register_forward_hook(lambda _, args, out: broken(0) if args[0].shape[1] > 6 else out)
    with pytest.raises(ArithmeticError):
        record(hf, prompts(), [SITE])
    handle.remove()
    assert [module.training for module in hf.modules()] == modes


def _at(made):
    recording, *rest = made
    return recording, SITE, *rest


@pytest.mark.parametrize(("name", "path"), [("llama", "replay"), ("gpt2", "hooks"), ("mamba", "hooks")])
def test_the_callers_autocast_and_return_dict_change_nothing(name, path):
    expected = measure(*_at(setting(fresh(name))), path=path)["kl"]
    hf = fresh(name)
    hf.config.return_dict = False
    with torch.autocast("cpu", torch.bfloat16):
        found = measure(*_at(setting(hf)), path=path)["kl"]
    assert torch.equal(found, expected) and hf.config.return_dict is False


@pytest.mark.parametrize("kind", ["plain", "bridge"])
def test_concurrent_measurements_equal_sequential_ones(kind):
    """Several threads measure while others call the model: every number equals that of a single thread."""
    hf = fresh("llama")
    handle = bridge("llama", hf) if kind == "bridge" else hf
    ids = torch.tensor([prompts()[0]])
    recording, prompt, position, vectors = setting(handle)
    run = lambda path: measure(recording, SITE, prompt, position, vectors, path=path, batch_rows=5)["kl"]  # noqa: E731
    expected, clean = {path: run(path) for path in ("replay", "hooks")}, hf(input_ids=ids).logits
    wrong, n = [], 3

    def measuring(path):
        for _ in range(n):
            if not torch.equal(run(path), expected[path]):
                wrong.append(path)

    def calling():
        for _ in range(5 * n):
            try:
                if not torch.equal(hf(input_ids=ids).logits, clean):
                    wrong.append("forward")
            except ModelError:
                pass  # a pass that was under way when a measurement began

    threads = [threading.Thread(target=measuring, args=(path,)) for path in ("replay", "hooks", "replay")]
    threads += [threading.Thread(target=calling) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(hf(input_ids=ids).logits, clean)
    assert hf.config._attn_implementation in ("eager", "sdpa")


def test_forward_pass_of_another_thread_waits():
    model = wrap(fresh("llama"))
    ids, done = torch.tensor([prompts()[0]]), threading.Event()

    def call():
        model.hf(input_ids=ids)
        done.set()

    thread = threading.Thread(target=call)
    with exclusive(model):
        thread.start()
        assert not done.wait(0.2)
        with exclusive(model):  # of the same thread, it goes on
            model.hf(input_ids=ids)
        assert not done.wait(0.1)
    thread.join()
    assert done.is_set() and "forward" not in vars(model.hf)


@pytest.mark.parametrize("before", [False, True])
def test_a_hook_is_removed_if_interrupted_while_registering(before):
    class Interrupted(torch.nn.Linear):
        def register_forward_hook(self, *args, **kwargs):
            super().register_forward_hook(*args, **kwargs)
            raise KeyboardInterrupt

        def register_forward_pre_hook(self, *args, **kwargs):
            super().register_forward_pre_hook(*args, **kwargs)
            raise KeyboardInterrupt

    module = Interrupted(2, 2)
    with pytest.raises(KeyboardInterrupt), hooked(module, lambda *_: None, before=before):
        pass
    assert not module._forward_hooks and not module._forward_pre_hooks and not module._forward_pre_hooks_with_kwargs


def test_attention_is_restored_if_interrupted_while_restoring(monkeypatch):
    recording, (prompt, position) = record(fresh("llama"), prompts(), [SITE]), rows()
    vectors, config = edited(recording, SITE, prompt, position), recording.model.hf.config
    own, due = type(config)._attn_implementation, []

    def interrupted(self, value):
        if due and value != "mechdiag_rows":
            due.clear()
            raise KeyboardInterrupt
        own.fset(self, value)

    monkeypatch.setattr(type(config), "_attn_implementation", property(own.fget, interrupted))
    due.append(True)
    with pytest.raises(KeyboardInterrupt):
        measure(recording, SITE, prompt, position, vectors)
    assert not due and config._attn_implementation == "sdpa"
    assert measure(recording, SITE, prompt, position, vectors).path == "replay"
