"""What tests of SGLang servers need to ask them and to judge their answers."""

import asyncio
import importlib.util

import torch

INSTALLED = importlib.util.find_spec("sglang") is not None
V, EOS = 93, 2


def label(server, version: int) -> None:
    """Call the server's weights ``version``, as a weight update does."""
    body = {"new_version": str(version), "abort_all_requests": False}
    asyncio.run(server.post("/update_weight_version", body, admin=True))


def fleet_of(*servers, version: int = 0):
    """A fleet in which every server is admitted."""
    from megatron_fipo.rollout.sglang.fleet import Fleet

    fleet = Fleet(servers)
    fleet.begin_update(version)
    for server in servers:
        fleet.admit(server)
    return fleet


def make_prompts(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    return [tuple(torch.randint(3, V, (n,), generator=generator).tolist()) for n in lengths]


def generate(client, prompts, sampling) -> list:
    """Completions; every one has been reported as finished exactly once."""
    finished: list[int] = []
    completions = asyncio.run(client.generate(prompts, range(len(prompts)), sampling, finished.append))
    assert sum(finished) == len(prompts) == len(completions)
    return completions


def check_completions(hf, prompts, completions, temperature: float = 1.0) -> None:
    """Every completion continues its own prompt: its log-probs are those that transformers gives to these tokens."""
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = torch.tensor([[*prompt, *completion.tokens]])
        with torch.no_grad():
            logits = hf(tokens).logits[0, len(prompt) - 1 : -1] / temperature
        wanted = logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logp), wanted, atol=1e-4, rtol=0)
