"""Facts and questions from files, and what a model knows."""

import numpy as np
import pytest
import torch

from diagnostics.disentanglement.facts import known_facts, load_facts
from interventions import ResultError, TextError, wrap
from tests.diagnostics.disentanglement.made_facts import QUESTIONS, answered, answers, model
from tests.tiny import tiny_model


def test_packaged_facts_are_complete():
    facts = load_facts()
    assert facts.attributes == ("capital", "continent", "language") and len(facts.entities) > 80
    assert all(len(own) == len(facts.entities) and all(own) for own in facts.values.values())
    assert len(set(facts.values["capital"])) == len(facts.entities) and len(set(facts.values["continent"])) == 6
    assert {tuple(own) for own in facts.questions.values()} == {facts.attributes}
    where = dict(zip(facts.entities, zip(*facts.values.values(), strict=True), strict=True))
    few = facts.only(["Peru", "Kenya"])
    assert (
        few.entities == ("Peru", "Kenya")
        and few.values["capital"] == ("Lima", "Nairobi")
        and few.sha256 != facts.sha256
    )
    with pytest.raises(TextError, match="no entity 'Atlantis'"):
        facts.only(["Atlantis"])
    assert where["Peru"] == ("Lima", "South America", "Spanish") and where["Kenya"] == ("Nairobi", "Africa", "Swahili")


def test_known_facts_are_those_the_model_answers(tmp_path):
    n, one = len(answers()), next(iter(answers()))
    facts = answered(tmp_path, wrong={(one, "b")})
    known = known_facts(model(), facts)
    assert known.count["known"] == {"a": n, "b": n - 1, "all": n - 1} and known.count["entities"] == n > 20
    assert one not in [facts.entities[e] for e in known.entity]
    for i, unit in enumerate(known.entity):
        for a, template in enumerate(QUESTIONS.values()):
            words = template.format(facts.entities[unit]).split()
            ids = known.tokens[int(known.prompt(np.array([i]), a)[0])]
            assert ids == [int(word[1:]) for word in words] and f"w{ids[known.position[i]]}" == facts.entities[unit]
            assert int(tiny_model("llama")(torch.tensor([ids])).logits[0, -1].argmax()) == known.answer[i, a]


def test_no_known_fact_or_no_tokenizer_raises(tmp_path):
    every = {(e, a) for e in answers() for a in QUESTIONS}
    with pytest.raises(ResultError, match="the model knows"):
        known_facts(model(), answered(tmp_path, wrong=every))
    with pytest.raises(TextError, match="no tokenizer"):
        known_facts(wrap(tiny_model("llama")), load_facts())


@pytest.mark.parametrize(
    ("facts", "questions", "said"),
    [
        ("entity,a\nx,1\n", "context,attribute,template\nc,a,{} is\n", "two attributes or more"),
        ("entity,a,b\nx,1,2\nx,1,2\n", "context,attribute,template\nc,a,{} is\n", "'x' stands in two rows"),
        ("entity,a,b\nx,1,\n", "context,attribute,template\nc,a,{} is\n", "no b of 'x'"),
        ("entity,a,b\nx,1,2\n", "context,attribute,template\nc,a,{} is\n", "one template for each of a, b"),
        ("entity,a,b\nx,1,2\n", "context,attribute,template\nc,a,The {} is\nc,b,A {} is\n", "differ before the entity"),
        ("entity,a,b\nx,1,2\n", "context,attribute,template\nc,a,It is\n", "expected {} once"),
        ("entity,a,b\nx,1,2\n", "context,template\nc,It is\n", "no column 'attribute'"),
        ("entity,a,b\nx,1,2\n", "context,attribute,template\n", "no template"),
    ],
)
def test_invalid_files_raise(tmp_path, facts, questions, said):
    for name, content in (("f.csv", facts), ("q.csv", questions)):
        (tmp_path / name).write_text(content)
    with pytest.raises(TextError, match=said):
        load_facts(tmp_path / "f.csv", tmp_path / "q.csv")
