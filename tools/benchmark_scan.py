#!/usr/bin/env python
"""The discounted scan against its peers and against memcpy, side by side in one process.

    python tools/benchmark_scan.py [--json FILE] [--threads 2] [--quick]

Keys: scan_over_memcpy (the lower of 2048 x 8192 and 10 million ragged tokens) and scan_in_cache (64 x 8192): share of
the speed of memcpy of the same bytes; numba_over_scan (the lowest of the three packs) and chunked_matmul_over_scan
(64 x 8192): how many times longer they take. Buffers are reused. The table also shows a copy past the caches.
"""

import numba
import numpy as np
import scipy.signal
import torch
from benchmarks import packs
from benchmarks.chunked_matmul import chunked_matmul_scan
from benchmarks.measure import interleave, parse_arguments, print_table, ratio, rows, write_report
from benchmarks.native import Native
from torch._higher_order_ops.associative_scan import associative_scan

from megatron_fipo.ops import discounted_scan

GAMMA = 2 ** (-1 / 32)
BYTES = 8  # in and out


@numba.njit(parallel=True, fastmath=True)
def numba_scan(x, y, offsets, gamma):
    for s in numba.prange(offsets.shape[0] - 1):
        value = np.float32(0)
        for t in range(offsets[s + 1] - 1, offsets[s] - 1, -1):
            value = x[t] + gamma * value
            y[t] = value


def torch_associative_scan(x_BL: torch.Tensor) -> torch.Tensor:
    """(a, b) stands for y -> a y + b; what comes first in scan order is applied first."""

    def combine(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    powers_BL = torch.full_like(x_BL, GAMMA)
    return associative_scan(combine, (powers_BL, x_BL), dim=1, reverse=True, combine_mode="generic")[1]


def measure_pack(pack: packs.Pack, native: Native, seconds: float) -> dict[str, list[float]]:
    x_T = 0.05 * torch.randn(pack.tokens, generator=torch.Generator().manual_seed(0))
    out_T, y_T = torch.empty_like(x_T), torch.empty_like(x_T)
    out_T.zero_(), y_T.zero_()  # touched, so that no sample pays for fresh pages
    cu_seqlens_S1 = pack.cu_seqlens_S1
    x, y, offsets, gamma = x_T.numpy(), y_T.numpy(), cu_seqlens_S1.numpy(), np.float32(GAMMA)
    scans = {
        "discounted_scan(out=)": lambda: discounted_scan(x_T, cu_seqlens_S1, GAMMA, out=out_T),
        "discounted_scan, fresh output": lambda: discounted_scan(x_T, cu_seqlens_S1, GAMMA),
        "numba loop": lambda: numba_scan(x, y, offsets, gamma),
        "C loop": lambda: native.scan(x_T, y_T, cu_seqlens_S1, pack.sequences, GAMMA),
    }
    for name, call in scans.items():
        check(call, y_T if "loop" in name else out_T, x_T, cu_seqlens_S1)
    copies = {
        "memcpy": lambda: native.copy(x_T, y_T, pack.tokens),
        "copy past the caches": lambda: native.copy_streaming(x_T, y_T, pack.tokens),
    }
    return interleave(scans | copies, seconds=seconds)


def check(call, written_T: torch.Tensor, x_T: torch.Tensor, cu_seqlens_S1: torch.Tensor) -> None:
    """A peer that computes something else would be no peer."""
    written_T.zero_()
    returned = call()
    result_T = returned if isinstance(returned, torch.Tensor) else written_T
    expected_T = discounted_scan(x_T.double(), cu_seqlens_S1, GAMMA)
    torch.testing.assert_close(result_T.double().flatten(), expected_T, rtol=1e-4, atol=1e-5)


def measure_slow_peers(pack: packs.Pack, seconds: float) -> dict[str, list[float]]:
    """Peers that take thousands of times longer, at a shape with rows."""
    x_T = 0.05 * torch.randn(pack.tokens, generator=torch.Generator().manual_seed(0))
    x_BL, out_T = x_T.view(pack.shape), torch.empty_like(x_T)
    reversed_rows = np.ascontiguousarray(x_BL.numpy()[:, ::-1])
    calls = {
        "discounted_scan(out=)": lambda: discounted_scan(x_T, pack.cu_seqlens_S1, GAMMA, out=out_T),
        "chunked matmul": lambda: chunked_matmul_scan(x_BL, GAMMA),
        "associative_scan": lambda: torch_associative_scan(x_BL),
        "scipy.signal.lfilter (1 thread)": lambda: scipy.signal.lfilter([1.0], [1.0, -GAMMA], reversed_rows, axis=1),
    }
    for call in list(calls.values())[:3]:
        check(call, out_T, x_T, pack.cu_seqlens_S1)
    return interleave(calls, seconds=seconds, rounds=3)


def main() -> None:
    arguments = parse_arguments(__doc__)
    torch.set_num_threads(arguments.threads)
    numba.set_num_threads(arguments.threads)
    seconds, native, table, ratios = 0.0 if arguments.quick else 8.0, Native(), [], {}

    cases = {
        "in": packs.equal_lengths(64, 8192),
        "out": packs.equal_lengths(2048, 8192),
        "ragged": packs.ragged(10_000_000),
    }
    over_copy, over_numba = {}, {}
    for key, pack in cases.items():
        samples = measure_pack(pack, native, seconds)
        over_copy[key] = ratio(samples, "memcpy", "discounted_scan(out=)")
        over_numba[key] = ratio(samples, "numba loop", "discounted_scan(out=)")
        table += rows(pack.name, samples, ours="discounted_scan(out=)", tokens=pack.tokens, bytes_per_token=BYTES)
        print_table(f"{pack.name}, {arguments.threads} threads", table[-len(samples) :])
    ratios["scan_over_memcpy"] = min(over_copy["out"], over_copy["ragged"])
    ratios["scan_in_cache"] = over_copy["in"]
    ratios["numba_over_scan"] = min(over_numba.values())

    pack = cases["in"]
    samples = measure_slow_peers(pack, seconds)
    ratios["chunked_matmul_over_scan"] = ratio(samples, "chunked matmul", "discounted_scan(out=)")
    slow = rows(
        f"{pack.name}, slow peers", samples, ours="discounted_scan(out=)", tokens=pack.tokens, bytes_per_token=BYTES
    )
    print_table(f"{pack.name}, slow peers, {arguments.threads} threads", slow)
    write_report(arguments.json, ratios, table + slow, packs.environment())


if __name__ == "__main__":
    main()
