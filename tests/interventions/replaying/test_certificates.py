"""Certificates of a run: none at its beginning, given back to a run that goes on, void once the model changed."""

import json
import math
import warnings

import pytest

from interventions import ModelError, Site, measure, record, wrap
from interventions.replaying.certificates import Certificate, certificates_of_run
from tests.tiny import edited, fresh, prompts, rows

SITE = Site(2)


def asked(model, positions=((0, 12), (0, 3))):
    recording = record(model, prompts(), [SITE])
    prompt, position = rows(positions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of full passes
        return measure(recording, SITE, prompt, position, edited(recording, SITE, prompt, position))


@pytest.mark.parametrize("name", ["llama", "gpt_neo"])
def test_resumed_run_takes_the_same_paths(name):
    """A later call relies on the checks of an earlier one, in the same process or in another."""
    longer = ((0, 12), (0, 3)), ((0, 20), (1, 3)), ((0, 5), (1, 2))
    with certificates_of_run() as run:
        model, whole, taken = wrap(fresh(name)), [], []
        for positions in longer:
            whole.append(asked(model, positions))
            taken.append(json.loads(json.dumps(run.taken()).replace("NaN", "null")))
    assert [len(part) for part in taken] == ([1, 1, 0] if name == "llama" else [1, 0, 1])
    for done in range(len(longer)):
        with certificates_of_run() as run:
            run.only([certificate for part in taken[:done] for certificate in part])
            model = wrap(fresh(name))
            again = [asked(model, positions) for positions in longer[done:]]
        for found, expected in zip(again, whole[done:], strict=True):
            assert (found.path, found.why_hooks) == (expected.path, expected.why_hooks)
            assert found.delta == expected.delta or (math.isnan(found.delta) and math.isnan(expected.delta))


def test_run_ignores_earlier_certificates():
    model = wrap(fresh("llama"))
    asked(model, ((0, 23), (0, 3)))
    with certificates_of_run() as run:
        asked(model)
        (certificate,) = run.taken()
        assert run.taken() == []
    expected = {
        "point": "resid_post",
        "width": 1,
        "first_block": 3,
        "longest": 12,
        "attention": "grouped",
        "reason": None,
    }
    assert {name: certificate[name] for name in expected} == expected
    assert set(certificate) == {"model", *Certificate.__dataclass_fields__}


def test_a_model_changed_during_a_run_raises():
    hf = fresh("llama")
    with certificates_of_run():
        asked(hf)
        hf.model.norm.variance_epsilon = 0.1
        with pytest.raises(ModelError, match="the model's modules changed during a run; begin it again"):
            asked(hf)
    asked(hf)
