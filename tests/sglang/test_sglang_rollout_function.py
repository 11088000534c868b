"""A user's rollout function on SGLang servers: turns, inserted tokens, the embedded engine's text."""

import pytest
from fleets import EOS, V, fleet_of, make_prompts
from tiny_models import trainer_log_probs
from torch import tensor
from torch.testing import assert_close
from transformers import AutoTokenizer

from megatron_fipo.data.prompts import Prompt
from megatron_fipo.rollout.engine import SamplingParams


async def turns(dialogue):
    """Goes on for a number of turns of its own."""
    for number in range(len(dialogue.prompt.tokens) % 3 + 1):
        await dialogue.generate(max_tokens=5 + number, stop=["w1"])
        dialogue.insert([40 + number, 7])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_writes_what_it_writes_on_the_embedded_engine(servers, build_model, hf_model, temperature):
    from megatron_fipo.parallel.replicas import Replicas
    from megatron_fipo.rollout.embedded import EmbeddedEngine
    from megatron_fipo.rollout.functions import FunctionResponder, RolloutFunction
    from megatron_fipo.rollout.sglang.client import Client
    from megatron_fipo.rollout.sglang.engine import SGLangEngine

    folder, _ = hf_model("qwen2", tied=False)
    tokenizer, chunks = AutoTokenizer.from_pretrained(folder), build_model(folder)
    fleet, replicas = fleet_of(*servers["qwen2"]), Replicas.current()
    engines = [
        SGLangEngine(fleet, Client(fleet, V, max_running=16), None, replicas),  # nothing publishes weights here
        EmbeddedEngine(chunks, V, max_batch=64, pad_id=0),
    ]
    prompts = [Prompt(i, prompt, "", "") for i, prompt in enumerate(make_prompts(8))]
    sampling = SamplingParams(40, temperature, stop_token_ids=(EOS, 7, 8))
    found, expected = (
        FunctionResponder(RolloutFunction("turns", turns), engine, replicas, tokenizer, V).respond(
            prompts, range(8), sampling
        )
        for engine in engines
    )
    if temperature == 0.0:  # servers draw from random numbers of their own
        for a, b in zip(found, expected, strict=True):
            assert (a.tokens, a.generated, a.finish_reason) == (b.tokens, b.generated, b.finish_reason)
    assert all(not all(c.generated) for c in found)
    for prompt, completion in zip(prompts, found, strict=True):
        wanted = trainer_log_probs(chunks, prompt.tokens, completion, temperature or 1.0, V)
        generated = tensor(completion.generated)
        assert_close(tensor(completion.logp)[generated], wanted[generated], atol=1e-4, rtol=0)
