"""The embedded engine against transformers, the trainer's log-probs, and itself under other batchings."""

import pytest
import torch
from tiny_models import trainer_log_probs

from megatron_fipo.rollout.engine import SamplingParams

CASES = [("qwen2", True), ("qwen3", False)]
LENGTHS = [5, 1, 17, 9, 9, 30, 2, 12]
V = 93


@pytest.fixture(scope="module", params=CASES, ids=["qwen2-tied", "qwen3"])
def policy(request, build_model, hf_model):
    family, tied = request.param
    folder, hf = hf_model(family, tied=tied)
    return build_model(folder), hf


def make_prompts(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, V, (n,), generator=generator).tolist() for n in lengths]


def engine(chunks, max_batch=64):
    from megatron_fipo.rollout.embedded import EmbeddedEngine

    return EmbeddedEngine(chunks, V, max_batch=max_batch, pad_id=0)


def test_greedy_equals_transformers_token_for_token(policy):
    chunks, hf = policy
    prompts = make_prompts()
    completions = engine(chunks).generate(prompts, [0] * len(prompts), SamplingParams(40, temperature=0.0))
    for prompt, completion in zip(prompts, completions, strict=True):
        wanted = hf.generate(
            torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert completion.tokens == tuple(wanted[0, len(prompt) :].tolist())
        assert completion.finish_reason == "length"


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.9), (0.0, 1.0)])
def test_log_probs_equal_the_trainers(policy, temperature, top_p):
    chunks, _ = policy
    prompts = make_prompts()
    sampling = SamplingParams(40, temperature=temperature, top_p=top_p, stop_token_ids=(7, 8, 9, 10, 11, 12))
    completions = engine(chunks).generate(prompts, range(len(prompts)), sampling)
    assert len({len(c.tokens) for c in completions}) > 1 or temperature == 0.0
    for prompt, completion in zip(prompts, completions, strict=True):
        assert len(completion.logp) == len(completion.tokens)
        wanted = trainer_log_probs(chunks, prompt, completion, temperature or 1.0, V)
        torch.testing.assert_close(torch.tensor(completion.logp), wanted, atol=1e-4, rtol=0)


def test_seeds_repeat_whatever_shares_the_batch(policy):
    chunks, _ = policy
    prompts = [p for p in make_prompts() for _ in range(3)]
    seeds = [11 * i + 5 for i in range(len(prompts))]
    sampling = SamplingParams(30, stop_token_ids=tuple(range(3, 9)))
    first = engine(chunks).generate(prompts, seeds, sampling)
    assert first == engine(chunks).generate(prompts, seeds, sampling)
    for max_batch in (1, 5):
        again = engine(chunks, max_batch).generate(prompts, seeds, sampling)
        assert [c.tokens for c in again] == [c.tokens for c in first]
        assert [c.finish_reason for c in again] == [c.finish_reason for c in first]
    backwards = engine(chunks).generate(prompts[::-1], seeds[::-1], sampling)[::-1]
    assert [c.tokens for c in backwards] == [c.tokens for c in first]
    other = engine(chunks).generate(prompts, [s + 1 for s in seeds], sampling)
    assert sum(a.tokens == b.tokens for a, b in zip(first, other, strict=True)) < len(first) / 2
    assert len({c.tokens for c in first[:3]}) > 1  # one prompt, three seeds


def test_stop_tokens_end_a_completion_and_belong_to_it(policy):
    chunks, _ = policy
    prompts = make_prompts([6] * 40)
    stops = (3, 40)
    free = engine(chunks).generate(prompts, range(40), SamplingParams(60))
    reported = []
    stopped = engine(chunks).generate(prompts, range(40), SamplingParams(60, stop_token_ids=stops), reported.append)
    assert all(len(c.tokens) == 60 and c.finish_reason == "length" for c in free)
    for whole, cut in zip(free, stopped, strict=True):
        end = next((i + 1 for i, t in enumerate(whole.tokens) if t in stops), 60)
        assert cut.tokens == whole.tokens[:end]
        assert cut.finish_reason == ("stop" if whole.tokens[end - 1] in stops else "length")
    assert {c.finish_reason for c in stopped} == {"stop", "length"}
    assert sum(reported) == 40 and len(reported) > 3


def test_one_token_and_no_prompts(policy):
    chunks, hf = policy
    prompts = make_prompts()
    for prompt, completion in zip(
        prompts, engine(chunks).generate(prompts, [0] * 8, SamplingParams(1, temperature=0.0)), strict=True
    ):
        with torch.no_grad():
            assert completion.tokens == (int(hf(torch.tensor([prompt])).logits[0, -1].argmax()),)
    assert engine(chunks).generate([], [], SamplingParams(4)) == []


def test_padded_vocabulary_is_never_sampled(policy):
    chunks, _ = policy
    prompts = make_prompts([4] * 64)
    completions = engine(chunks).generate(prompts, range(64), SamplingParams(30, temperature=20.0))
    tokens = {t for c in completions for t in c.tokens}
    assert max(tokens) < V and len(tokens) > 80


def test_training_mode_and_gradients_are_left_alone(policy):
    chunks, _ = policy
    for mode in (True, False):
        chunks[0].train(mode)
        engine(chunks).generate(make_prompts([3]), [0], SamplingParams(2))
        assert chunks[0].training is mode
        assert torch.is_grad_enabled()
    chunks[0].train(True)


def test_new_weights_are_used_at_once(policy):
    chunks, _ = policy
    prompts = make_prompts()
    sampling = SamplingParams(8, temperature=0.0)
    before = engine(chunks).generate(prompts, [0] * 8, sampling)
    weight = chunks[0].decoder.layers[0].mlp.linear_fc2.weight
    saved = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(-3)
        assert engine(chunks).generate(prompts, [0] * 8, sampling) != before
        weight.copy_(saved)
    assert engine(chunks).generate(prompts, [0] * 8, sampling) == before
