"""What a weight update costs beside a broadcast of the same bytes.

    python tools/benchmark_weight_sync.py [--json FILE] [--quick]

The tensors of a bf16 model with Qwen2.5-0.5B's shapes (14 layers, 0.7 GB) go over gloo to one process that unpacks
them into views, in turn as a whole update (session, buckets, version) and as one bare broadcast, between the same two
processes and into memory that is there already. `sync_over_broadcast` is the time of the broadcast over that of the
update (more is better: 1 is line rate), `sync_buckets` the memory that the sending process takes for updates, in
buckets. Then a real SGLang server on this machine takes the same update: it also copies into its parameters.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from benchmarks.measure import write_report
from torch import Tensor

from megatron_fipo.observe.environment import describe_environment
from megatron_fipo.rollout.sglang.buckets import TensorSpec
from megatron_fipo.rollout.sglang.calls import Calls
from megatron_fipo.rollout.sglang.export import Export
from megatron_fipo.rollout.sglang.fleet import Fleet
from megatron_fipo.rollout.sglang.parameters import server_parameter
from megatron_fipo.rollout.sglang.server import Server, ServerAddress
from megatron_fipo.rollout.sglang.servers import StartSettings, start_servers
from megatron_fipo.rollout.sglang.update_group import UpdateGroup
from megatron_fipo.rollout.sglang.update_session import SyncSettings
from megatron_fipo.rollout.sglang.weight_sync import WeightSync

BUCKET_MB = 256  # the default without GPUs
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 14,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def make_weights(quick: bool) -> dict[str, Tensor]:
    """The model's tensors, of small values."""
    hidden, inner, heads = CONFIG["hidden_size"], CONFIG["intermediate_size"], 14 * 64
    shapes = {"model.embed_tokens.weight": (CONFIG["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for i in range(2 if quick else CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        for name, rows in (("q", heads), ("k", 128), ("v", 128)):
            shapes |= {f"{layer}.self_attn.{name}_proj.weight": (rows, hidden)}
            shapes |= {f"{layer}.self_attn.{name}_proj.bias": (rows,)}
        shapes |= {f"{layer}.self_attn.o_proj.weight": (hidden, heads)}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (hidden, inner)}
    return {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}


@contextlib.contextmanager
def receiver(weights: dict[str, Tensor]) -> Iterator[Server]:
    """A process that takes the weights."""
    command = [sys.executable, str(Path(__file__).parent / "benchmarks" / "weight_receiver.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        json.dump(sorted({server_parameter(name)[0] for name in weights}), process.stdin)
        process.stdin.close()
        yield Server("receiver", ServerAddress(f"http://127.0.0.1:{int(process.stdout.readline())}", "", ""))
        process.kill()


class RawBroadcast:
    """The same bytes in one broadcast to the same process."""

    def __init__(self, server: Server, nbytes: int) -> None:
        self._server, self._calls, self._data = server, Calls(Fleet([server])), torch.ones(nbytes, dtype=torch.uint8)
        self._group = UpdateGroup("raw", 2, "gloo", "127.0.0.1", 60, 120)
        where = {"master_address": self._group.host, "master_port": self._group.port, "group_name": "raw"}
        body = where | {"rank_offset": 1, "world_size": 2, "backend": "gloo"}
        joined = self._calls.start(server.post("/init_weights_update_group", body))
        self._group.open()
        joined.result()

    def seconds(self) -> float:
        body = {"nbytes": len(self._data), "group_name": "raw"}
        answer = self._calls.start(self._server.post("/raw_broadcast", body, 120))
        self._group.broadcast(self._data[:1]).result().wait()
        start = time.perf_counter()
        self._group.broadcast(self._data).result().wait()
        seconds = time.perf_counter() - start
        answer.result()
        return seconds


class Update:
    """A whole update of one server."""

    def __init__(self, server: Server, weights: dict[str, Tensor]) -> None:
        self._fleet, self._version = Fleet([server]), 0
        settings = SyncSettings(bucket_bytes=BUCKET_MB * 2**20)
        layout = [TensorSpec.of(*pair) for pair in weights.items()]
        self._sync = WeightSync(Export(layout, lambda: iter(weights.items())), self._fleet, settings)

    def seconds(self) -> float:
        self._version += 1
        self._fleet.begin_update(self._version)
        start = time.perf_counter()
        self._sync.publish(self._version)
        seconds = time.perf_counter() - start
        if not self._fleet.serving():
            raise RuntimeError(self._fleet.reasons())
        return seconds


def memory_kb(field: str) -> int:
    """A line of /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def peak_mb(call) -> float:
    """What a call takes on top of what is resident before it."""
    before = memory_kb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    call()
    return (memory_kb("VmHWM") - before) / 1024


def row(name: str, seconds: list[float], nbytes: int) -> dict:
    low, median, high = statistics.quantiles(seconds, n=4)
    rate = nbytes / median / 1e9
    print(f"  {name:34}{median * 1e3:10.1f} ms  ({low * 1e3:.1f} .. {high * 1e3:.1f}){rate:8.2f} GB/s")
    return {
        "case": "weight sync",
        "name": name,
        "milliseconds": median * 1e3,
        "quartiles": [low * 1e3, high * 1e3],
        "samples": len(seconds),
        "gigabytes_per_second": rate,
    }


def real_server(weights: dict[str, Tensor], rounds: int) -> list[float]:
    """Seconds of updates of an SGLang server with this model."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        layers = sum(name.endswith("input_layernorm.weight") for name in weights)
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
        save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        flags = ("--max-total-tokens", "2048", "--context-length", "512")
        (server,) = start_servers(StartSettings(folder, 1, flags, "bfloat16", 1, Path(folder) / "log"))
        try:
            update = Update(server, weights)
            update.seconds()
            return [update.seconds() for _ in range(rounds)]
        finally:
            server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--quick", action="store_true", help="few layers and rounds, to see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 3 if arguments.quick else 31
    weights = make_weights(arguments.quick)
    nbytes = sum(tensor.nbytes for tensor in weights.values())
    print(f"{len(weights)} tensors, {nbytes / 1e9:.2f} GB, buckets of {BUCKET_MB} MB")
    with receiver(weights) as server:
        update = Update(server, weights)
        buckets = peak_mb(update.seconds) / BUCKET_MB
        raw = RawBroadcast(server, nbytes)
        update.seconds(), raw.seconds()
        samples: dict[str, list[float]] = {"raw broadcast": [], "weight update": []}
        for _ in range(rounds):
            samples["raw broadcast"].append(raw.seconds())
            samples["weight update"].append(update.seconds())
    samples["weight update of an SGLang server"] = real_server(weights, rounds)
    rows = [row(name, seconds, nbytes) for name, seconds in samples.items()]
    pairs = zip(samples["raw broadcast"], samples["weight update"], strict=True)
    ratios = {"sync_over_broadcast": statistics.median(a / b for a, b in pairs), "sync_buckets": buckets}
    write_report(arguments.json, ratios, rows, describe_environment())


if __name__ == "__main__":
    main()
