"""Real SGLang servers on tiny models, shared by all tests here."""

import os

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


class Servers:
    """Started when first asked for: "qwen2", two servers; "qwen3"; "qwen3_moe", whose first layer has no experts;
    "victim", one more of qwen2, to be killed. Their weights are version 0."""

    KINDS = {
        "qwen2": ("qwen2", {}, 2),
        "qwen3": ("qwen3", {}, 1),
        "qwen3_moe": ("qwen3_moe", {"moe_intermediate_size": 64}, 1),  # on CPU SGLang pads it to a multiple of 32
        "victim": ("qwen2", {}, 1),
    }

    def __init__(self, hf_model, make_folder):
        self._hf_model, self._make_folder, self._started = hf_model, make_folder, {}

    def model(self, kind: str):
        """(folder, transformers model) that servers of this kind start from."""
        family, settings, _ = self.KINDS[kind]
        return self._hf_model(family, tied=False, **settings)

    def __getitem__(self, kind: str) -> list:
        from megatron_fipo.rollout.sglang.servers import StartSettings, start_servers

        if kind not in self._started:
            folder, count = str(self.model(kind)[0]), self.KINDS[kind][2]
            self._started[kind] = start_servers(StartSettings(folder, count, (), "float32", 3, self._make_folder(kind)))
            for server in self._started[kind]:
                label(server, 0)
        return self._started[kind]

    def close(self) -> None:
        for server in (server for group in self._started.values() for server in group):
            server.kill()


@pytest.fixture(scope="session")
def servers(sglang_installed, hf_model, tmp_path_factory):
    """Real servers; see Servers."""
    servers = Servers(hf_model, tmp_path_factory.mktemp)
    yield servers
    servers.close()
