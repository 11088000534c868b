"""Two nodes: Linux network namespaces with a cable between them, each with the launch that the training scripts use."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_training import SMALL, finished, rows, train, without_clock

ROOT = Path(__file__).parents[2]
STEPS = ("--num-steps", 2, "--run-name", "run")


@dataclass(frozen=True)
class Node:
    """namespace and network interface by name; address: IPv4."""

    namespace: str
    interface: str
    address: str


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    """Nodes 0 and 1, which reach each other and nothing else."""
    made = [Node(f"fipo{os.getpid()}n{i}", f"fipo{i}", f"10.213.7.{i + 1}") for i in range(2)]
    first = ip("netns", "add", made[0].namespace)
    if first.returncode != 0:
        reason = f"no network namespaces here: {first.stderr.strip()}"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    try:
        commands = [
            ("netns", "add", made[1].namespace),
            (
                "-n",
                made[0].namespace,
                "link",
                "add",
                "fipo0",
                "type",
                "veth",
                "peer",
                "fipo1",
                "netns",
                made[1].namespace,
            ),
        ]
        for node in made:
            inside = ("-n", node.namespace)
            commands.append((*inside, "address", "add", f"{node.address}/24", "dev", node.interface))
            commands += [(*inside, "link", "set", device, "up") for device in ("lo", node.interface)]
        for command in commands:
            done = ip(*command)
            assert done.returncode == 0, f"ip {' '.join(command)}: {done.stderr}"
        yield made
    finally:
        for node in made:
            ip("netns", "delete", node.namespace)  # and the cable with it


def start(nodes: list[Node], rank: int, *flags: object, join_timeout: int = 120) -> subprocess.Popen[str]:
    """What a training script does on node `rank`, with one process there instead of eight."""
    node = nodes[rank]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": nodes[0].address, "MASTER_PORT": "29400",
        "GPUS_PER_NODE": "1", "JOIN_TIMEOUT": str(join_timeout), "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": node.interface,
    }  # fmt: skip
    command = ["ip", "netns", "exec", node.namespace, "bash", "-euo", "pipefail", "-c"]
    command += ['source examples/cluster.sh; launch "$@"', "launch", "-m", "megatron_fipo.train", *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def end(process: subprocess.Popen[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Wait for the end; a process that hangs fails the test with what it said."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"still running after {seconds} s: {out[-2000:]} {err[-4000:]}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.timeout(600)
def test_training_across_two_nodes_equals_training_on_one(nodes, trained_base, tmp_path):
    flags = (*SMALL.split(), "--hf-model", trained_base, "--prompt-data", trained_base / "train.jsonl", *STEPS)
    flags += ("--eval-data", f"heldout:{trained_base / 'heldout.jsonl'}:1", "--runs-dir", tmp_path / "two")
    processes = [start(nodes, rank, *flags) for rank in range(2)]
    try:
        output, quiet = (finished(end(process, 300)) for process in processes)
    finally:
        for process in processes:
            process.terminate()  # of two nodes, one may have failed alone
    assert "2/2" in output and quiet == ""  # the second node's rank has nothing to report
    finished(train(2, tmp_path / "one", trained_base, *STEPS))
    one, two = (rows(tmp_path / name / "run") for name in ("one", "two"))
    assert [row["step"] for row in two] == [0, 1, 2]
    assert [*map(without_clock, two)] == [*map(without_clock, one)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (0, "wait_for_nodes: 1 of 2 nodes came within 4 s; missing: node rank 1"),
        (1, "wait_for_nodes: node 0 at 10.213.7.1:29401 cannot be reached within 4 s"),
    ],
)
def test_a_node_that_does_not_come_is_named_in_time(nodes, rank, words):
    """torchrun alone says '1/2 clients joined', or gives the stack trace of a socket."""
    process = end(start(nodes, rank, "--preset", "quickstart", join_timeout=4), 200)
    assert process.returncode == 3 and process.stdout == ""
    assert process.stderr.startswith(words) and process.stderr.count("\n") == 1
