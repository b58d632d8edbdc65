"""Captions from provenance."""

from diagnostics.figures.axes import caption, null_models, patched, sink_rule, wrapped

MADE = {
    "model": "some-model", "model_note": None, "norm": "RMSNorm", "dtype": "float32", "prompts": 24, "seed": 4, "sink_filter": 10.0,
    "text": {"name": "some text"}, "sites": ["1.attn_out", "3.attn_out", "1.resid_post"], "horizon": 1, "null_models": [],
    "path": {"1.attn_out": "replay", "3.attn_out": "replay"}, "replay_delta": 4.6e-6,
}  # fmt: skip


def test_captions():
    assert caption(MADE, "Nine rows.") == (
        "some-model (RMSNorm; float32), 24 prompts of some text, seed 4, ‖x‖ > 10 × median left out. Nine rows. "
        "By replay, logits within 5e-06."
    )
    other = MADE | {"model_note": "dequantised", "sink_filter": None, "text": {"chat_template": True}}
    other |= {"replay_delta": None, "path": {"1.attn_out": "hooks+replay", "1.resid_post": "hooks"}}
    assert caption(other, "Nine rows.") == (
        "some-model (dequantised; float32), 24 prompts of given text, chat template, seed 4, no sink filter. Nine rows. By hooks and replay."
    )
    own = caption(
        MADE | {"path": "auto"}, "Nine rows.", texts="9 texts", place="1.attn_out", sinks="sink filter as chosen"
    )
    assert own == "some-model (RMSNorm; float32), 1.attn_out, 9 texts, sink filter as chosen. Nine rows."


def test_sink_rule():
    assert sink_rule(MADE, "position 0") == "position 0 and ‖x‖ > 10 × median left out"
    assert sink_rule(MADE | {"skip_first": 1}) == "position 0 and ‖x‖ > 10 × median left out"
    assert sink_rule(MADE | {"skip_first": 4}) == "the first 4 positions and ‖x‖ > 10 × median left out"
    assert sink_rule(MADE | {"sink_filter": None}, "position 0") == "position 0 left out"
    assert sink_rule(MADE | {"sink_filter": None, "skip_first": 4}) == "no sink filter"


def test_patched_and_read_positions():
    assert patched(MADE) == "patched at attn_out, resid_post, read at the edited position"
    one = patched(MADE | {"horizon": 4}, point="attn_out", context="in_place", done="ablated")
    assert one == "ablated in context at attn_out, read at 4 positions (sums)"
    assert patched(MADE | {"horizon": "last"}).endswith("read at the last position")


def test_randomly_initialised_models_are_counted():
    assert null_models(MADE) == ""
    assert null_models(MADE | {"null_models": ["random 0"]}) == " Grey: 1 randomly initialised model."
    assert null_models(MADE | {"null_models": ["random 0", "random 1"]}) == " Grey: 2 randomly initialised models."


def test_captions_are_wrapped_to_the_width_of_the_figure():
    lines = wrapped("Bars: 95 %, " * 40, 9.6).splitlines()
    assert all(140 < len(line) <= 168 for line in lines[:-1])
    assert not any(line.startswith("%") for line in lines)
