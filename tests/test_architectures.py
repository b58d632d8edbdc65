"""One class of each kind of architecture; `make architectures` tries every class of transformers."""

import warnings

import pytest
import torch
import transformers

from interventions import Site, measure, record
from tests.architectures import BLOCK, MAPPINGS, check, expected, mapping_of, outcome, prompts
from tests.shrunk import build

KINDS = {
    "GptOss": "experts, attention sinks and sliding windows",
    "DeepseekV3": "keys and values from a shared latent vector",
    "Cohere2": "attention beside the MLP, a tied and scaled head",
    "Falcon": "one key for all heads",
    "Qwen2VL": "images beside text, rotary positions in three parts",
    "Jamba": "Mamba blocks between attention blocks",
    "RecurrentGemma": "recurrent blocks between local attention",
    "Llama4Text": "attention within chunks",
    "OpenAIGPT": "norms after the sum, no cache",
    "Gemma3nText": "several residual streams",
    "PaliGemma": "attention in both directions",
    "T5Gemma2": "an encoder and a decoder",
}


@pytest.mark.parametrize("name", KINDS)
def test_each_architecture_is_exact_or_refused(name):
    found = outcome(mapping_of(name), name)
    assert expected(name, found), found


@pytest.mark.parametrize(("name", "dtype"), [("Mamba", torch.bfloat16), ("Mamba2", torch.float16)], ids=str)
def test_float32_stream_works_with_half_precision_weights(name, dtype):
    config = getattr(transformers, f"{name}Config")
    hf = build(config, MAPPINGS["text"][config]).to(dtype)
    texts, site, row = prompts(), Site(BLOCK), (torch.tensor([0, 1]), torch.tensor([12, 5]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert check(hf).kind == "hooks"
        recording = record(hf, texts, [site])
        vectors = recording.at(site, *row)
        assert vectors.dtype == torch.float32 and recording.model.dtype == dtype
        assert measure(recording, site, *row, vectors)["kl"].tolist() == [0, 0]
