"""Each pipeline stage of the trainer sends its own weights: one launch of two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

TESTS = Path(__file__).parents[1]
RECEIVER = TESTS.parent / "tools" / "benchmarks" / "weight_receiver.py"


@pytest.fixture
def receivers(hf_model, sglang_installed):
    """The model's folder, and three processes that take its weights."""
    from megatron_fipo.rollout.sglang.parameters import server_parameter

    folder, _ = hf_model("qwen2", tied=True, num_hidden_layers=4)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = json.dumps(sorted({server_parameter(name)[0] for name in weights.keys()}))  # noqa: SIM118
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, str(RECEIVER), "--sums"], **pipes) for _ in range(3)]
    for process in processes:
        process.stdin.write(names)
        process.stdin.close()
    yield folder, processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.timeout(400)
def test_stages_send_in_turn_and_outlive_a_server_that_stops(receivers):
    folder, processes = receivers
    where = [f"{int(process.stdout.readline())}:{process.pid}" for process in processes]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).with_name("stage_senders_worker.py")), str(folder), *where]
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[:6000]
    updates = [line for line in process.stdout.splitlines() if line.startswith("update")]
    assert updates == ["update 1: [0, 1, 2]", "update 2: [0, 1, 2]", "update 3: [0, 2]", "update 4: [0, 2]"]
