"""What servers answer: the trainer's log-probs, the embedded engine's text; and what becomes of spoiled answers."""

import asyncio

import pytest
import torch
from fleets import EOS, V, check_completions, fleet_of, generate, make_prompts
from proxy import EVENT_FAULTS, STATUS_FAULTS, FaultyProxy
from tiny_models import trainer_log_probs

from megatron_fipo.errors import UserError
from megatron_fipo.rollout.engine import SamplingParams


def client_of(*servers, **deadlines):
    from megatron_fipo.rollout.sglang.client import Client
    from megatron_fipo.rollout.sglang.health import Deadlines

    return Client(fleet_of(*servers), V, max_running=16, deadlines=Deadlines(**deadlines))


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def policy(request, servers, build_model, hf_model):
    """(servers, the trainer's model, transformers' model)."""
    folder, hf = hf_model(request.param, tied=False)
    return servers[request.param], build_model(folder), hf


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (0.6, 0.9)])
def test_log_probs_equal_the_trainers(policy, temperature, top_p):
    servers, chunks, _ = policy
    prompts = make_prompts(8)
    sampling = SamplingParams(70, temperature, top_p, stop_token_ids=(EOS, 7, 8))
    completions = generate(client_of(*servers), prompts, sampling)
    assert {c.finish_reason for c in completions} == {"stop", "length"} or len({len(c.tokens) for c in completions}) > 1
    for prompt, completion in zip(prompts, completions, strict=True):
        wanted = trainer_log_probs(chunks, prompt, completion, temperature, V)
        torch.testing.assert_close(torch.tensor(completion.logp), wanted, atol=1e-4, rtol=0)


def test_greedy_text_equals_the_embedded_engines(policy):
    from megatron_fipo.rollout.embedded import EmbeddedEngine

    servers, chunks, _ = policy
    prompts = make_prompts(8)
    sampling = SamplingParams(40, temperature=0.0, stop_token_ids=(EOS, 7, 8))
    wanted = EmbeddedEngine(chunks, V, max_batch=64, pad_id=0).generate(prompts, [0] * 8, sampling)
    completions = generate(client_of(*servers), prompts, sampling)
    assert [(c.tokens, c.finish_reason) for c in completions] == [(c.tokens, c.finish_reason) for c in wanted]


def test_samples_of_one_prompt_differ_and_share_its_cache(servers):
    prompts = [p for p in make_prompts(4) for _ in range(6)]
    client = client_of(*servers["qwen2"])
    completions = generate(client, prompts, SamplingParams(12, stop_token_ids=(EOS,)))
    for i in range(0, 24, 6):
        assert len({c.tokens for c in completions[i : i + 6]}) > 1


@pytest.mark.parametrize("prompt", [(5, V), (5, -1), ()])
def test_ids_outside_the_vocabulary_never_reach_a_server(servers, prompt):
    server = servers["qwen2"][0]
    with pytest.raises(UserError, match="tokenizer"):
        asyncio.run(client_of(server).generate([(3,), prompt], [0, 1], SamplingParams(4, stop_token_ids=(EOS,)), print))
    assert len(generate(client_of(server), [(3,)], SamplingParams(4, stop_token_ids=(EOS,)))) == 1


@pytest.fixture
def proxied(servers):
    """A server behind a proxy, and the proxy."""
    from megatron_fipo.rollout.sglang.server import Server, ServerAddress

    address = servers["qwen2"][0].address
    proxy = FaultyProxy(address.url)
    yield Server("proxied", ServerAddress(proxy.url, address.api_key, address.admin_key)), proxy
    proxy.close()


@pytest.mark.parametrize("kind", STATUS_FAULTS + EVENT_FAULTS)
def test_a_spoiled_answer_is_asked_again(kind, proxied, servers, hf_model):
    """Two answers of each kind among good ones: every prompt is answered once, with tokens of its own."""
    _, hf = hf_model("qwen2", tied=False)
    server, proxy = proxied
    silence = {"stall_s": 1.5} if kind == "half-open" else {}
    client = client_of(server, servers["qwen2"][1], **silence)
    generate(client, make_prompts(4, seed=1), SamplingParams(40, stop_token_ids=(EOS,)))
    proxy.kind, proxy.faults = kind, 2
    prompts = make_prompts(12)
    completions = generate(client, prompts, SamplingParams(40, stop_token_ids=(EOS,)))
    check_completions(hf, prompts, completions)
    faults = client.faults
    expected = {"500": "refused", "half-open": "lost", "reset in mid-body": "lost", "aborted": "lost"}
    counted = getattr(faults, expected.get(kind, "malformed"))
    assert proxy.spoiled == 2 and counted == faults.lost + faults.refused + faults.malformed
    # On a machine that stands still for 1.5 s, good answers on their way beside the half-open ones are lost too.
    assert counted >= 2 if kind == "half-open" else counted == 2
    assert len(client.fleet.serving()) == 2


def test_the_only_server_is_asked_again_while_it_still_works_on_the_lost_answer(proxied, hf_model):
    server, proxy = proxied
    proxy.kind, proxy.faults = "reset in mid-body", 2
    client = client_of(server)
    prompts = make_prompts(6)
    completions = generate(client, prompts, SamplingParams(300, stop_token_ids=(EOS,)))
    check_completions(hf_model("qwen2", tied=False)[1], prompts, completions)
    assert proxy.spoiled == 2 == client.faults.lost and proxy.requests == 8


@pytest.mark.parametrize("kind", ["500", "NaN log-prob"])
def test_a_server_that_only_fails_is_condemned(kind, proxied, servers):
    server, proxy = proxied
    proxy.kind, proxy.faults = kind, 10**6
    client = client_of(server, servers["qwen2"][1])
    generate(client, make_prompts(24), SamplingParams(20, stop_token_ids=(EOS,)))
    assert "failed answers in a row" in client.fleet.condemned[server]
    assert proxy.spoiled >= 4 and len(client.fleet.serving()) == 1


def test_no_whole_answer_ends_the_rollout_and_stops_the_rest(proxied, servers):
    from megatron_fipo.rollout.sglang.client import RolloutFailed

    server, proxy = proxied
    proxy.kind, proxy.faults = "NaN log-prob", 10**6
    client = client_of(server)
    with pytest.raises(RolloutFailed, match="log-probs that are none"):
        generate(client, make_prompts(12), SamplingParams(400, stop_token_ids=(EOS,)))
    assert asyncio.run(_idle(servers["qwen2"][0]))


async def _idle(server) -> bool:
    """Whether the server drops all its requests in 15 s."""
    for _ in range(75):
        loads = (await server.get("/v1/loads"))["loads"]
        if sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads) == 0:
            return True
        await asyncio.sleep(0.2)
    return False


def test_a_refused_request_is_not_asked_again(proxied):
    from megatron_fipo.rollout.sglang.client import RolloutFailed

    server, proxy = proxied
    with pytest.raises(RolloutFailed, match="context length"):
        generate(client_of(server), [(3,)], SamplingParams(10_000, stop_token_ids=(EOS,)))
    assert proxy.requests == 1


def slow_run(proxied, servers, hf_model) -> None:
    """One server a hundred times slower than the other: it is kept, and its answers are used."""
    _, hf = hf_model("qwen2", tied=False)
    server, proxy = proxied
    proxy.delay_s = 1.0
    client = client_of(server, servers["qwen2"][1], stall_s=0.8)
    prompts = make_prompts(8)
    completions = generate(client, prompts, SamplingParams(70, stop_token_ids=(EOS,)))
    check_completions(hf, prompts, completions)
    assert len(client.fleet.serving()) == 2 and proxy.requests >= 2 and proxy.spoiled == 0


def test_a_slow_server_is_kept(proxied, servers, hf_model):
    slow_run(proxied, servers, hf_model)


@pytest.mark.long
def test_a_slow_server_is_kept_every_time(proxied, servers, hf_model):
    for _ in range(50):
        slow_run(proxied, servers, hf_model)
