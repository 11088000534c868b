"""How fast the operators run on this GPU, against a copy of the same bytes measured beside them.

    python tools/benchmark_gpu.py [--json FILE]

Keys in the JSON: `loss_over_copy` and `scan_over_copy` at 16 million tokens (1 is the speed of a copy), and
`loss_microseconds_in_graph` at 64 thousand tokens, with the clearing of the graph's workspace.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from megatron_fipo import _host
from megatron_fipo.ops.library import operators

LOSS_BYTES = 4 + 4 + 1 + 4 + 4  # logp, old_logp, mask; gradient, weight; advantages are one per sequence
SCAN_BYTES = 4 + 4
ROUNDS = 15


def make_batch(tokens: int, sequence: int = 5120) -> dict[str, torch.Tensor]:
    """Response lengths around `sequence`, no two alike; a tenth of the tokens are prompt."""
    g = torch.Generator(device="cuda").manual_seed(1)
    logp_T = -torch.rand(tokens, device="cuda", generator=g)
    cuts = (
        torch.arange(0, tokens, sequence, device="cuda")
        + torch.arange(len(range(0, tokens, sequence)), device="cuda") % 97
    )
    cu_S1 = torch.cat([cuts.new_zeros(1), cuts[1:], cuts.new_tensor([tokens])]).int()
    return {
        "logp": logp_T,
        "old_logp": logp_T - 0.1 * torch.randn(tokens, device="cuda", generator=g),
        "advantage": torch.randn(cu_S1.shape[0] - 1, device="cuda", generator=g),
        "mask": torch.rand(tokens, device="cuda", generator=g) < 0.9,
        "cu_seqlens": cu_S1,
        "grad": torch.empty(tokens, device="cuda"),
        "weight": torch.empty(tokens, device="cuda"),
    }


def loss_call(batch: dict[str, torch.Tensor]):
    settings = (2.0 ** (-1 / 32), 1.0, 1.2, 10.0, 10.0, 0.2, 0.28, False)
    inputs = [batch[name] for name in ("logp", "old_logp", "advantage", "mask", "cu_seqlens")]
    return lambda: operators.fipo_loss_out(*inputs, None, None, False, *settings, batch["grad"], batch["weight"])


def seconds(calls: dict[str, object], repeats: int) -> dict[str, float]:
    """The median of each call's time; the calls take turns, so that a slow moment meets them all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3 / repeats)
    return {name: statistics.median(values) for name, values in times.items()}


def copy_of(num_bytes: int):
    """Reads half of the bytes and writes the other half."""
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def row_of(name: str, tokens: int, per_token: int, call) -> dict[str, object]:
    timed = seconds({"call": call, "copy": copy_of(tokens * per_token)}, repeats=10)
    return {
        "name": name,
        "tokens": tokens,
        "microseconds": timed["call"] * 1e6,
        "gigabytes_per_second": tokens * per_token / timed["call"] / 1e9,
        "copy_gigabytes_per_second": tokens * per_token / timed["copy"] / 1e9,
        "share_of_copy": timed["copy"] / timed["call"],
    }


def measure_loss(tokens: int) -> dict[str, object]:
    return row_of("fused loss", tokens, LOSS_BYTES, loss_call(make_batch(tokens)))


def measure_scan(tokens: int) -> dict[str, object]:
    batch = make_batch(tokens)
    x_T, cu_S1, out = batch["logp"], batch["cu_seqlens"], batch["grad"]
    return row_of(
        "scan", tokens, SCAN_BYTES, lambda: operators.discounted_scan_out(x_T, cu_S1, 0.97857, True, None, out)
    )


def measure_in_graph(tokens: int, calls: int = 20) -> dict[str, object]:
    call = loss_call(make_batch(tokens))
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    timed = seconds({"graph": graph.replay, "eager": call}, repeats=10)
    return {
        "name": "fused loss in a graph",
        "tokens": tokens,
        "microseconds": timed["graph"] * 1e6 / calls,
        "eager_microseconds": timed["eager"] * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write ratios, rows and environment there")
    options = parser.parse_args()
    if not torch.cuda.is_available() or not _host.build_info()["cuda"]:
        raise SystemExit("this needs a GPU and an extension built with nvcc: run `make bench-gpu` on such a machine")
    rows = [measure(tokens) for tokens in (1 << 20, 4 << 20, 16 << 20) for measure in (measure_loss, measure_scan)]
    rows.append(measure_in_graph(64 << 10))
    for row in rows:
        print("  ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))
    ratios = {
        "loss_over_copy": rows[4]["share_of_copy"],
        "scan_over_copy": rows[5]["share_of_copy"],
        "loss_microseconds_in_graph": rows[-1]["microseconds"],
    }
    environment = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "build": _host.build_info()}
    if options.json:
        options.json.write_text(json.dumps({"ratios": ratios, "rows": rows, "environment": environment}, indent=1))


if __name__ == "__main__":
    main()
