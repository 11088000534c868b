"""Real SGLang servers on tiny models, shared by all tests here, and what is needed to judge their answers."""

import asyncio
import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

INSTALLED = importlib.util.find_spec("sglang") is not None
V, EOS = 93, 2


def pytest_collection_modifyitems(items):
    reason = "SGLang is not installed: make sglang"
    for item in items:
        if "sglang_installed" in getattr(item, "fixturenames", ()) and not INSTALLED:
            if os.environ.get("CI"):
                raise pytest.UsageError(f"{reason} (CI must not skip these tests)")
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def sglang_installed():
    """Tests that ask for it are skipped without SGLang, and fail in CI."""


@pytest.fixture(scope="session")
def servers(sglang_installed, hf_model, tmp_path_factory):
    """{"qwen2": two servers, "qwen3": one, "victim": one more of qwen2, to be killed}; their weights are version 0."""
    from megatron_fipo.rollout.sglang.servers import StartSettings, start_servers

    def start(name: str, family: str, count: int):
        folder, _ = hf_model(family, tied=False)
        log_folder = tmp_path_factory.mktemp(name)
        return start_servers(StartSettings(str(folder), count, ("--random-seed", "3"), "float32", 1, log_folder))

    kinds = {"qwen2": ("qwen2", 2), "qwen3": ("qwen3", 1), "victim": ("qwen2", 1)}
    for family, _ in kinds.values():
        hf_model(family, tied=False)
    with ThreadPoolExecutor() as pool:
        futures = {name: pool.submit(start, name, *kind) for name, kind in kinds.items()}
        started = {name: future.result() for name, future in futures.items()}
    for server in (server for group in started.values() for server in group):
        label(server, 0)
    yield started
    for server in (server for group in started.values() for server in group):
        server.kill()


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
