"""Real SGLang servers on tiny models, shared by all tests here."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from fleets import INSTALLED, label


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
