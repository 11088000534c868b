"""What happens when a server, or the trainer that started it, stops or dies. The victim is killed last."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from fleets import EOS, V, check_completions, fleet_of, generate, label, make_prompts

from megatron_fipo.errors import UserError
from megatron_fipo.rollout.engine import SamplingParams

ROOT = Path(__file__).parents[2]


def client_of(*servers, **deadlines):
    from megatron_fipo.rollout.sglang.client import Client
    from megatron_fipo.rollout.sglang.health import Deadlines

    return Client(fleet_of(*servers), V, max_running=16, deadlines=Deadlines(**deadlines))


@pytest.fixture(scope="module")
def pair(servers):
    """(a server that stays, the victim)."""
    return servers["qwen2"][0], servers["victim"][0]


def while_generating(victim, action) -> threading.Thread:
    """Calls ``action`` as soon as the victim has requests running."""

    async def wait() -> None:
        for _ in range(600):
            if (await victim.get("/v1/loads"))["loads"][0]["num_running_reqs"] > 0:
                return
            await asyncio.sleep(0.02)
        raise TimeoutError("the victim never got a request")

    def run() -> None:
        asyncio.run(wait())
        action()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def signal_group(server, number: int) -> None:
    """To every process of the server, as a machine that stops or dies does."""
    for process in [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]:
        process.send_signal(number)


def check_all_answered(client, prompts, completions, hf, victim) -> None:
    check_completions(hf, prompts, completions)
    assert victim in client.fleet.condemned and len(client.fleet.serving()) == 1


def engine_of(client):
    """An engine whose weight updates leave the weights as they are and count their version on."""
    from megatron_fipo.parallel.replicas import Replicas
    from megatron_fipo.rollout.sglang.engine import SGLangEngine

    class Labels:
        def publish(self, version: int) -> None:
            for server in client.fleet.healthy():
                label(server, version)
                client.fleet.admit(server)

        def close(self) -> None:
            pass

    return SGLangEngine(client.fleet, client, Labels(), Replicas.current())


PROMPTS = make_prompts(24, seed=4)
LONG = SamplingParams(300, stop_token_ids=(EOS,))


@pytest.mark.parametrize("when", ["idle", "generating"])
def test_a_stopped_server_is_condemned_and_comes_back_after_an_update(when, pair, hf_model, megatron):
    keeper, victim = pair
    client = client_of(keeper, victim, stall_s=2.0, probe_s=3.0)
    engine = engine_of(client)
    if when == "idle":
        signal_group(victim, signal.SIGSTOP)
        thread = threading.Thread(target=lambda: None)
        thread.start()
    else:
        thread = while_generating(victim, lambda: signal_group(victim, signal.SIGSTOP))
    finished: list[int] = []
    try:
        completions = engine.generate(PROMPTS, [*range(len(PROMPTS))], LONG, finished.append)
        thread.join()
        check_all_answered(client, PROMPTS, completions, hf_model("qwen2", tied=False)[1], victim)
        assert "no token" in client.fleet.condemned[victim] and sum(finished) == len(PROMPTS)
        assert client.faults.lost > 0
    finally:
        signal_group(victim, signal.SIGCONT)

    engine.update_weights(1)
    assert len(client.fleet.serving()) == 2
    metrics = engine.metrics()
    assert metrics["rollout/servers_condemned"] == 1 and metrics["rollout/servers_serving"] == 2
    assert metrics["rollout/answers_lost"] == client.faults.lost >= metrics["rollout/answers_redispatched"] > 0
    engine.generate(PROMPTS, [*range(len(PROMPTS))], LONG)
    engine.update_weights(0)
    assert engine.metrics()["rollout/servers_condemned"] == engine.metrics()["rollout/answers_lost"] == 0


def test_a_server_killed_while_it_generates(pair, hf_model):
    keeper, victim = pair
    client = client_of(keeper, victim)
    thread = while_generating(victim, lambda: os.kill(victim.pid, signal.SIGKILL))
    completions = generate(client, PROMPTS, LONG)
    thread.join()
    check_all_answered(client, PROMPTS, completions, hf_model("qwen2", tied=False)[1], victim)
    assert client.faults.lost > 0
    wait_for(lambda: not victim.alive())


def test_a_server_killed_while_idle(pair, hf_model):
    """Also: no server left is an error with the reason, at once."""
    from megatron_fipo.rollout.sglang.client import RolloutFailed

    keeper, victim = pair
    assert not victim.alive(), "runs after the test above"
    client = client_of(keeper, victim)
    completions = generate(client, PROMPTS, LONG)
    check_all_answered(client, PROMPTS, completions, hf_model("qwen2", tied=False)[1], victim)
    with pytest.raises(RolloutFailed, match="no server is left.*(process ended|nothing listens)"):
        generate(client_of(victim), PROMPTS, LONG)


def test_a_dead_server_is_started_again_and_joins_at_an_update(pair, hf_model, megatron):
    keeper, victim = pair
    assert not victim.alive(), "runs after the tests above"
    client = client_of(keeper, victim)
    engine = engine_of(client)
    engine.generate(PROMPTS, [*range(len(PROMPTS))], LONG)
    engine.update_weights(1)
    assert victim.alive() and client.fleet.serving() == [keeper]
    wait_for(lambda: answers(victim), 240)
    engine.generate(PROMPTS, [*range(len(PROMPTS))], LONG)
    assert client.fleet.serving() == [keeper], "it has the weights of its disk until an update"
    engine.update_weights(2)
    assert client.fleet.serving() == [keeper, victim]
    completions = engine.generate(PROMPTS, [*range(len(PROMPTS))], LONG)
    check_completions(hf_model("qwen2", tied=False)[1], PROMPTS, completions)
    engine.update_weights(0)


def answers(server) -> bool:
    from megatron_fipo.rollout.sglang.server import ServerLost, ServerRefused

    try:
        asyncio.run(server.get("/health", 30))
    except (ServerLost, ServerRefused):
        return False
    return True


def wait_for(condition, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


STARTER = """
import sys
from pathlib import Path
from megatron_fipo.rollout.sglang.servers import StartSettings, start_servers
start_servers(StartSettings(sys.argv[1], 1, (), "float32", 0, Path(sys.argv[2])))
"""


def test_nothing_survives_a_killed_trainer(servers, hf_model, tmp_path):
    """SIGKILL leaves the trainer no time to clean up."""
    folder, _ = hf_model("qwen2", tied=False)
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(folder), str(tmp_path)], cwd=ROOT)
    process = psutil.Process(starter.pid)
    wait_for(lambda: len(process.children(recursive=True)) >= 4, 120)  # supervisor, server, its scheduler and tracker
    family = process.children(recursive=True)
    starter.kill()
    starter.wait()
    wait_for(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family))


def settings(folder: Path, tmp_path: Path, **changes):
    from megatron_fipo.rollout.sglang.servers import StartSettings

    return StartSettings(str(folder), 1, changes.pop("flags", ()), "float32", 0, tmp_path, **changes)


def test_a_port_in_use_is_told_at_once(servers, hf_model, tmp_path):
    from megatron_fipo.rollout.sglang.servers import start_servers

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--sglang-port: port {port} on 127.0.0.1 cannot be used"):
            start_servers(settings(hf_model("qwen2", tied=False)[0], tmp_path, port=port))
    assert not list(tmp_path.iterdir())


def test_a_server_that_cannot_start_shows_its_log(servers, hf_model, tmp_path):
    from megatron_fipo.rollout.sglang.servers import start_servers

    with pytest.raises(UserError, match="unrecognized arguments: --no-such-flag"):
        start_servers(settings(hf_model("qwen2", tied=False)[0], tmp_path, flags=("--no-such-flag",)))


def test_wrong_keys(servers):
    from megatron_fipo.rollout.sglang.client import RolloutFailed
    from megatron_fipo.rollout.sglang.server import Server, ServerAddress
    from megatron_fipo.rollout.sglang.servers import attach

    good = servers["qwen2"][1].address
    assert attach([good.url + "/"], good.api_key, good.admin_key)[0].address == good
    for keys in (("", ""), (good.api_key, good.api_key), ("wrong", good.admin_key)):
        with pytest.raises(UserError, match="does not take our keys"):
            attach([good.url], *keys)
    stranger = Server("stranger", ServerAddress(good.url, "wrong", "wrong"))
    client = client_of(stranger, servers["qwen2"][1])
    generate(client, PROMPTS, LONG)
    assert "does not take our key" in client.fleet.condemned[stranger] and client.faults.refused > 0
    with pytest.raises(RolloutFailed, match="does not take our key"):
        generate(client_of(stranger), PROMPTS, LONG)


def test_nobody_at_an_address():
    from megatron_fipo.rollout.sglang.servers import attach

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match="does not answer"):
            attach([f"http://127.0.0.1:{unused.getsockname()[1]}"], "", "")


def test_a_reserved_port_goes_to_nobody_else():
    from megatron_fipo.rollout.sglang.servers import _reserve

    with _reserve("127.0.0.1", 0) as reserved, socket.socket() as server, socket.socket() as other:
        address = reserved.getsockname()
        with pytest.raises(OSError):
            other.bind(address)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as every server does
        server.bind(address)
        server.listen()
