"""Weight updates of real servers: the servers then are the trainer; and what happens when one is broken off.

Runs behind the other files, as servers are killed here.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from fleets import INSTALLED, V, fleet_of, make_prompts

from megatron_fipo.rollout.engine import SamplingParams

if not INSTALLED and not os.environ.get("CI"):
    pytest.skip("SGLang is not installed: make sglang", allow_module_level=True)

from megatron_fipo.quantization.formats import WeightFormat  # noqa: E402
from megatron_fipo.rollout.sglang.buckets import TensorSpec  # noqa: E402
from megatron_fipo.rollout.sglang.export import Export  # noqa: E402
from megatron_fipo.rollout.sglang.fleet import Fleet  # noqa: E402
from megatron_fipo.rollout.sglang.server import Server, ServerLost  # noqa: E402
from megatron_fipo.rollout.sglang.update_session import SyncSettings  # noqa: E402
from megatron_fipo.rollout.sglang.weight_sync import WeightSync  # noqa: E402

ROOT = Path(__file__).parents[2]
BUCKET, BUCKETS = 40_000, 17  # bytes, and how many the qwen2 model takes
PROMPTS = make_prompts(2, seed=11)
SEED = int.from_bytes(os.urandom(2), "big")


def export_of(weights) -> Export:
    return Export([TensorSpec.of(*pair) for pair in weights.items()], lambda: iter(weights.items()))


def export_of_model(chunks, stream=None, weight_format=None) -> Export:
    from megatron_fipo.checkpoint.hf import export_hf_weights, hf_layout

    layout = [TensorSpec(t.name, t.dtype, t.shape) for t in hf_layout(chunks, V)]
    return Export(layout, stream or (lambda: export_hf_weights(chunks, V)), weight_format or WeightFormat())


def weights_of(chunks) -> dict[str, torch.Tensor]:
    from megatron_fipo.checkpoint.hf import export_hf_weights

    return {name: tensor.clone() for name, tensor in export_hf_weights(chunks, V)}


def perturb(chunks, seed: int) -> None:
    """An optimizer update of a size that changes what is generated."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=g))


def greedy(server, prompt, tokens: int = 10) -> tuple[list[int], list[float], dict]:
    """Token ids, their log-probs, and what else the server says about its answer."""
    body = {
        "input_ids": list(prompt),
        "sampling_params": {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True},
        "return_logprob": True,
    }
    answer = asyncio.run(server.post("/generate", body, deadline_s=120))
    return (
        answer["output_ids"],
        [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]],
        answer["meta_info"],
    )


def check_is_trainer(server, chunks, version: int | None = None) -> None:
    """Greedy text as the embedded engine gives it with the trainer's weights, log-probs within 1e-4."""
    from megatron_fipo.rollout.embedded import EmbeddedEngine

    engine = EmbeddedEngine(chunks, V, max_batch=8, pad_id=0)
    wanted = engine.generate(PROMPTS, range(len(PROMPTS)), SamplingParams(10, temperature=0.0))
    for prompt, completion in zip(PROMPTS, wanted, strict=True):
        tokens, logp, meta = greedy(server, prompt)
        assert tuple(tokens) == completion.tokens
        assert max(abs(a - b) for a, b in zip(logp, completion.logp, strict=True)) < 1e-4
        assert version is None or meta["weight_version"] == str(version)


def publish(sync: WeightSync, fleet: Fleet, version: int) -> None:
    fleet.begin_update(version)
    sync.publish(version)


class FaultyServer(Server):
    """A real server to which something happens right before it is asked for ``path`` the ``nth`` time."""

    def __init__(self, server: Server, path: str, nth: int, action):
        super().__init__(server.name, server.address, server.process)
        self.struck = False
        self._path, self._calls_left, self._action = path, nth, action

    async def post(self, path, body=None, deadline_s=60.0, admin=False):
        if path == self._path:
            self._calls_left -= 1
            if self._calls_left == 0:
                self.struck = True
                await self._action(self)
        return await super().post(path, body, deadline_s, admin)


def strike(number: int):
    """An action: send a signal to every process of the server, as a machine that dies or hangs does."""

    async def action(server) -> None:
        for process in [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]:
            process.send_signal(number)

    return action


@pytest.fixture(scope="module")
def trainer(hf_model, build_model, servers):
    """The model from which the qwen2 servers started."""
    return build_model(hf_model("qwen2", tied=False)[0])


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "qwen3_moe"])
def test_servers_are_the_trainer_before_and_after_every_sync(kind, servers, build_model):
    from megatron_fipo.checkpoint.hf import export_hf_weights

    chunks = build_model(servers.model(kind)[0])
    fleet = Fleet(servers[kind])
    exports = []
    for server in fleet.servers:
        check_is_trainer(server, chunks)

    def export():
        exports.append(1)
        return export_hf_weights(chunks, V)

    sync = WeightSync(export_of_model(chunks, export), fleet, SyncSettings(bucket_bytes=BUCKET, check=True))
    for version in (1, 2):
        perturb(chunks, version)
        publish(sync, fleet, version)
        assert fleet.serving() == list(fleet.servers), fleet.reasons()
        for server in fleet.servers:
            check_is_trainer(server, chunks, version)
    assert len(exports) == 2  # one pass for each update
    sync.close()


@pytest.mark.parametrize("pause", ["abort", "retract", "in_place"])
def test_requests_in_flight(pause, servers, trainer):
    """What becomes of them is as --weight-sync-pause says; every token's log-prob is that of the weights it names."""
    server, fleet = servers["qwen2"][0], Fleet(servers["qwen2"][:1])
    sync = WeightSync(export_of(weights_of(trainer)), fleet, SyncSettings(bucket_bytes=BUCKET, pause=pause))
    publish(sync, fleet, 10)
    sync.close()
    perturb(trainer, 10)
    sync = WeightSync(export_of(weights_of(trainer)), fleet, SyncSettings(bucket_bytes=BUCKET, pause=pause))
    answers = []
    thread = threading.Thread(target=lambda: answers.append(greedy(server, PROMPTS[0], tokens=400)))
    thread.start()
    asyncio.run(until_running(server))
    publish(sync, fleet, 11)
    thread.join(120)
    sync.close()
    assert fleet.serving() == [server], fleet.reasons()
    ((tokens, logp, meta),) = answers
    if pause == "abort":
        assert meta["finish_reason"]["type"] == "abort" and 0 < len(tokens) < 400
        return
    assert meta["finish_reason"]["type"] == "length" and len(tokens) == 400
    (old, new) = meta["weight_versions"]
    assert (old["version"], new["version"]) == ("10", "11") and 0 < old["end"] == new["start"] < 400
    if pause == "retract":  # what follows was computed from new keys and values
        wanted = log_probs(trainer, PROMPTS[0], tokens)[new["start"] :]
        assert (torch.tensor(logp[new["start"] :]) - wanted).abs().max() < 1e-4


async def until_running(server) -> None:
    for _ in range(1000):
        if (await server.get("/v1/loads"))["loads"][0]["num_running_reqs"] > 0:
            return
        await asyncio.sleep(0.01)
    raise TimeoutError("the request never ran")


@torch.no_grad()
def log_probs(chunks, prompt, tokens) -> torch.Tensor:
    from megatron_fipo.data.packing import pack
    from megatron_fipo.model.logprob import packed_log_probs

    batch = pack([sample_of([*prompt, *tokens])], [0], torch.zeros(1))
    return packed_log_probs(chunks[0], batch, temperature=1.0, vocab_size=V)[len(prompt) - 1 :]


def sample_of(tokens):
    import numpy as np

    from megatron_fipo.data.samples import Sample

    n = len(tokens)
    return Sample(0, 0, np.array(tokens, np.int32), np.ones(n, bool), np.zeros(n, np.float32), "stop", (), 0.0, False)


def test_a_server_that_shares_the_device_gets_handles_of_memory(servers, build_model):
    """Here of shared memory. It generates after an update only, and dies of a wrong one."""
    from megatron_fipo.rollout.sglang.colocated import ColocatedSync

    (server,) = servers["victim"]
    chunks, fleet = build_model(servers.model("victim")[0]), Fleet([server])
    sync = ColocatedSync(export_of_model(chunks), fleet, SyncSettings(bucket_bytes=BUCKET, check=True), server)
    for version in (1, 2):
        publish(sync, fleet, version)
        assert fleet.serving() == [server], fleet.reasons()
        check_is_trainer(server, chunks, version)
        sync.sleep()
        assert fleet.serving() == [] and fleet.healthy() == [server]
        perturb(chunks, version)
        sync.wake()
    publish(sync, fleet, 3)
    check_is_trainer(server, chunks, 3)
    sync.close()
    wrong = weights_of(chunks) | {"model.norm.weight": torch.ones(32)}
    settings = SyncSettings(bucket_bytes=BUCKET, deadline_s=60.0)
    sync = ColocatedSync(export_of(wrong), fleet, settings, server)
    publish(sync, fleet, 4)
    sync.close()
    assert fleet.serving() == [] and "bucket" in fleet.condemned[server]
    assert not server.alive()


def test_a_tensor_that_does_not_fit_leaves_nobody_serving(servers, trainer):
    """Both servers refuse it, in the middle of an update. They come back with a whole one."""
    fleet = fleet_of(*servers["qwen2"])
    weights = weights_of(trainer)
    wrong = weights | {"model.norm.weight": torch.ones(32)}
    sync = WeightSync(export_of(wrong), fleet, SyncSettings(bucket_bytes=BUCKET))
    publish(sync, fleet, 20)
    sync.close()
    assert fleet.serving() == []
    for reason in fleet.condemned.values():
        assert "bucket" in reason and "Attempted to load weight" in reason and "end of its log" in reason
    for server in fleet.servers:
        fleet.pardon(server)
    assert fleet.serving() == []  # only an update makes them whole
    sync = WeightSync(export_of(weights), fleet, SyncSettings(bucket_bytes=BUCKET, check=True))
    publish(sync, fleet, 21)
    sync.close()
    assert fleet.serving() == list(fleet.servers), fleet.reasons()
    check_is_trainer(fleet.servers[0], trainer, 21)


@pytest.mark.parametrize("change", ["unknown", "missing"])
def test_names_that_are_not_the_models_are_refused_before_anything_is_sent(change, servers, trainer):
    weights = weights_of(trainer)
    norm = weights.pop("model.norm.weight")
    if change == "unknown":  # SGLang would skip it and report success
        weights["model.norn.weight"] = norm
    fleet = Fleet(servers["qwen2"][:1])
    sync = WeightSync(export_of(weights), fleet, SyncSettings(bucket_bytes=BUCKET))
    publish(sync, fleet, 22)
    sync.close()
    (reason,) = fleet.condemned.values()
    assert ("no place for model.norn.weight" if change == "unknown" else "no model.norm.weight") in reason
    check_is_trainer(fleet.servers[0], trainer, 21)  # untouched, and generating


def test_a_trainer_that_died_in_an_update_comes_back(servers, hf_model, trainer):
    """Its servers are paused, in a session that nobody will end, perhaps inside a broadcast."""
    fleet = Fleet(servers["qwen2"])
    addresses = [[s.name, s.address.url, s.address.api_key, s.address.admin_key] for s in fleet.servers]
    died = subprocess.run(
        [sys.executable, "-c", DYING_TRAINER, json.dumps(addresses), str(hf_model("qwen2", tied=False)[0])],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert died.returncode == 9 and "dies at tensor 20" in died.stdout, died.stderr
    sync = WeightSync(export_of(weights_of(trainer)), fleet, SyncSettings(bucket_bytes=BUCKET, check=True))
    publish(sync, fleet, 30)
    sync.close()
    assert fleet.serving() == list(fleet.servers), fleet.reasons()
    for server in fleet.servers:
        check_is_trainer(server, trainer, 30)


DYING_TRAINER = f"""
import json, os, sys
from safetensors.torch import load_file
from megatron_fipo.rollout.sglang.buckets import TensorSpec
from megatron_fipo.rollout.sglang.export import Export
from megatron_fipo.rollout.sglang.fleet import Fleet
from megatron_fipo.rollout.sglang.update_session import SyncSettings
from megatron_fipo.rollout.sglang.server import Server, ServerAddress
from megatron_fipo.rollout.sglang.weight_sync import WeightSync

fleet = Fleet([Server(name, ServerAddress(*rest)) for name, *rest in json.loads(sys.argv[1])])
weights = load_file(sys.argv[2] + "/model.safetensors")

def stream():
    for number, (name, tensor) in enumerate(weights.items()):
        if number == 20:
            print("dies at tensor 20", flush=True)
            os._exit(9)
        yield name, tensor + 1

fleet.begin_update(29)
export = Export([TensorSpec.of(*pair) for pair in weights.items()], stream)
WeightSync(export, fleet, SyncSettings(bucket_bytes={BUCKET})).publish(29)
"""


def test_a_server_stuck_in_another_group_is_killed(servers, hf_model):
    """Somebody told it to join a group that nobody opens: it waits there for half an hour and takes no other call."""
    from safetensors.torch import load_file

    where = {"master_address": "127.0.0.1", "master_port": 9, "group_name": "nobody's"}
    body = where | {"rank_offset": 1, "world_size": 2, "backend": "gloo"}
    server, waits = servers["qwen3"][0], []

    async def join_nobody(stuck) -> None:
        call = server.post("/init_weights_update_group", body, deadline_s=60, admin=True)
        waits.append(pool.submit(asyncio.run, call))
        await asyncio.sleep(1.0)

    fleet = Fleet([FaultyServer(server, "/init_weights_update_group", 1, join_nobody)])
    weights = load_file(hf_model("qwen3", tied=False)[0] / "model.safetensors")
    sync = WeightSync(export_of(weights), fleet, SyncSettings(bucket_bytes=BUCKET, join_deadline_s=3.0))
    with ThreadPoolExecutor() as pool:
        publish(sync, fleet, 40)
    sync.close()
    (reason,) = fleet.condemned.values()
    assert "/init_weights_update_group" in reason and "no answer" in reason
    assert not server.alive()
    assert isinstance(waits[0].exception(), ServerLost)  # it waited until it was killed


def break_off(servers, trainer, path: str, nth: int, number: int, version: int) -> str:
    """One of two servers is struck; the other one gets all the weights and serves. Returns why it was condemned."""
    keeper, victim = servers[0], FaultyServer(servers[1], path, nth, strike(number))
    fleet = fleet_of(keeper, victim)
    settings = SyncSettings(bucket_bytes=BUCKET, check=True, deadline_s=20.0)
    sync = WeightSync(export_of(weights_of(trainer)), fleet, settings)
    publish(sync, fleet, version)
    assert victim.struck and not victim.alive()
    assert fleet.serving() == [keeper]
    check_is_trainer(keeper, trainer, version)
    publish(sync, fleet, version + 1)  # the group without it goes on
    assert fleet.serving() == [keeper], fleet.reasons()
    sync.close()
    return fleet.condemned[victim]


UPDATE = "/update_weights_from_distributed"


def test_a_server_that_is_killed_at_a_bucket(servers, trainer):
    nth = random.Random(SEED).randrange(1, BUCKETS + 1)
    print(f"bucket {nth}, from seed {SEED}")
    perturb(trainer, 50)
    reason = break_off(servers["qwen2"], trainer, UPDATE, nth, signal.SIGKILL, 50)
    assert f"bucket {nth} of {BUCKETS}" in reason


POINTS = [
    *((UPDATE, nth) for nth in range(1, BUCKETS + 1)),
    *((path, 1) for path in ("/pause_generation", "/begin_weight_update", "/init_weights_update_group")),
    *((path, 1) for path in ("/end_weight_update", "/flush_cache", "/continue_generation")),
]


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("point", POINTS, ids=lambda p: f"{p[0].strip('/')}-{p[1]}")
def test_a_server_that_dies_or_hangs_at_any_point(point, number, servers, hf_model, trainer, tmp_path):
    from megatron_fipo.rollout.sglang.servers import StartSettings, start_servers

    folder, _ = hf_model("qwen2", tied=False)
    (victim,) = start_servers(StartSettings(str(folder), 1, (), "float32", 1, tmp_path))
    try:
        break_off([servers["qwen2"][0], victim], trainer, *point, number, 60)
    finally:
        victim.kill()
