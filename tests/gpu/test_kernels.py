"""The operators on a GPU: `make test-gpu`. Needs one GPU, torch >= 2.10 and the built extension; nothing else."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_cases import CASES, aggregate_arguments, differences, expected_results, loss_arguments, make_inputs

from megatron_fipo import _host
from megatron_fipo.ops.library import operators

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)
if not _host.build_info()["cuda"]:
    pytest.skip("this build has no CUDA kernels: nvcc was missing when it was made", allow_module_level=True)

BY_NAME = {case.name: case for case in CASES}
LONG = [
    "almost no discount",
    "more than 32 tiles ahead",
    "random lengths",
    "empty sequences",
    "bf16",
    "misaligned by 1",
]


def on_gpu(tensor, offset: int = 0):
    """A fresh copy that starts `offset` elements behind a boundary; and fresh memory around it holds NaN."""
    if tensor is None:
        return None
    if tensor.dtype == torch.bool:
        room = torch.ones(tensor.shape[0] + offset + 64, dtype=torch.bool, device="cuda")
    else:
        fill = float("nan") if tensor.dtype.is_floating_point else -(2**30)
        room = torch.full((tensor.shape[0] + offset + 64,), fill, dtype=tensor.dtype, device="cuda")
    room[offset : offset + tensor.shape[0]] = tensor.cuda()
    return room[offset : offset + tensor.shape[0]]


def poison() -> None:
    """Leave NaN in the memory that outputs will be allocated from."""
    for size in (1 << 10, 1 << 14, 1 << 18, 1 << 21):
        torch.full((size,), float("nan"), device="cuda")


def gpu_results(inputs) -> dict:
    offset = inputs.case.misaligned
    streams = ("logp_T", "old_logp_T", "mask_T", "token_weight_T", "x_T", "advantage")
    moved = {
        name: on_gpu(value, offset if name in streams else 0) if isinstance(value, torch.Tensor) else value
        for name, value in vars(inputs).items()
    }
    moved = type(inputs)(**moved)
    grad_T, weight_T = (torch.full(inputs.mask_T.shape, torch.nan, device="cuda") for _ in range(2))
    poison()
    loss_S, counts_S2, statistics_K = operators.fipo_loss_out(*loss_arguments(moved), grad_T, weight_T)
    aggregate_S, beyond_c_S = operators.future_kl_aggregate(*aggregate_arguments(moved))
    y_T = {}
    for name, reverse in (("reverse", True), ("forward", False)):
        y_T[name] = torch.full_like(moved.x_T, torch.nan)
        operators.discounted_scan_out(moved.x_T, moved.cu_seqlens_S1, moved.gamma, reverse, moved.carry_S, y_T[name])
    results = {
        "loss": loss_S, "counts": counts_S2, "grad": grad_T, "weight": weight_T, "statistics": statistics_K,
        "aggregate": aggregate_S, "beyond_c": beyond_c_S, **y_T,
        "scaled": operators.scale_per_sequence(moved.x_T, moved.scale_S, moved.cu_seqlens_S1),
    }  # fmt: skip
    return {name: value.cpu() for name, value in results.items()}


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kernels_agree_with_the_cpu_kernels(name, seed):
    inputs = make_inputs(BY_NAME[name], seed)
    assert differences(gpu_results(inputs), expected_results(inputs), inputs.case) == []


@pytest.mark.parametrize(("half_life", "tolerance"), [(32, 5e-7), (512, 5e-6), (2048, 2e-5)])
@pytest.mark.parametrize("reverse", [True, False])
def test_scan_against_float64(half_life, tolerance, reverse):
    gamma, length = 2.0 ** (-1.0 / half_life), 131072
    x_T = 0.05 * torch.randn(length, dtype=torch.float64).abs()
    cu_S1 = torch.tensor([0, length])
    expected_T = operators.discounted_scan(x_T, cu_S1, gamma, reverse, None)
    y_T = operators.discounted_scan(x_T.float().cuda(), cu_S1.cuda(), gamma, reverse, None).cpu()
    assert float((y_T - expected_T).abs().max() / expected_T.abs().max()) < tolerance
    exact_T = operators.discounted_scan(x_T.cuda(), cu_S1.cuda(), gamma, reverse, None).cpu()
    torch.testing.assert_close(exact_T, expected_T, rtol=1e-12, atol=0)


def test_loss_through_autograd_against_float64():
    from megatron_fipo.loss import FipoConfig, fipo_loss

    cfg = FipoConfig.preset("fipo-32b")
    inputs = make_inputs(BY_NAME["long, half-life over several tiles"], seed=5)
    logp_T = inputs.logp_T.nan_to_num(-1.0)
    rest = (inputs.old_logp_T, inputs.advantage, inputs.mask_T, inputs.cu_seqlens_S1)

    def run(device, dtype, backend):
        leaf_T = logp_T.to(device, dtype).requires_grad_()
        old_T, advantage, mask_T, cu_S1 = (t.to(device) for t in rest)
        out = fipo_loss(leaf_T, old_T.to(dtype), advantage.to(dtype), mask_T, cu_S1, cfg, backend=backend)
        out.loss.backward()
        return out.loss.detach().cpu().double(), leaf_T.grad.cpu().double()

    loss, grad_T = run("cuda", torch.float32, "compiled")
    expected_loss, expected_grad_T = run("cpu", torch.float64, "torch")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-7)
    assert float((grad_T - expected_grad_T).abs().max()) <= 2e-5 * float(expected_grad_T.abs().max())


@pytest.mark.parametrize("name", LONG)
def test_results_are_bitwise_repeatable(name):
    inputs = make_inputs(BY_NAME[name], seed=6)
    first = gpu_results(inputs)
    for _ in range(20):
        for key, value in gpu_results(inputs).items():
            torch.testing.assert_close(value, first[key], rtol=0, atol=0, equal_nan=True)


def gpu_batch(tokens: int, seed: int) -> tuple:
    g = torch.Generator(device="cuda").manual_seed(seed)
    logp_T = -torch.rand(tokens, device="cuda", generator=g)
    old_logp_T = logp_T - 0.2 * torch.randn(tokens, device="cuda", generator=g)
    mask_T = torch.rand(tokens, device="cuda", generator=g) < 0.9
    cu_S1 = torch.arange(0, tokens + 1, 5000, device="cuda", dtype=torch.int32)
    cu_S1 = torch.cat([cu_S1, cu_S1.new_tensor([tokens])])
    advantage_S = torch.randn(cu_S1.shape[0] - 1, device="cuda", generator=g)
    settings = (2.0 ** (-1 / 2048), 0.8, 1.2, 3.0, 10.0, 0.2, 0.28, False)
    return logp_T, old_logp_T, advantage_S, mask_T, cu_S1, None, None, False, *settings


def assert_same(actual, expected) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


def test_graph_capture_and_replay():
    """A graph computes from what its inputs hold at replay; replays run beside eager calls on another stream."""
    first, second = gpu_batch(300_000, 1), gpu_batch(300_000, 2)
    expected = [operators.fipo_loss(*batch) for batch in (first, second)]
    static = tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in first)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        operators.fipo_loss(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operators.fipo_loss(*static)
        again = operators.fipo_loss(*static)
    for batch, result in zip((first, second, first), (expected[0], expected[1], expected[0]), strict=True):
        for target, source in zip(static, batch, strict=True):
            if isinstance(target, torch.Tensor):
                target.copy_(source)
        torch.cuda.synchronize()
        graph.replay()
        with torch.cuda.stream(side):
            eager = operators.fipo_loss(*second)
        torch.cuda.synchronize()
        assert_same(captured, result)
        assert_same(again, result)
        assert_same(eager, expected[1])


def test_streams_side_by_side():
    batches = [gpu_batch(200_000 + 1000 * i, i) for i in range(4)]
    expected = [operators.fipo_loss(*batch) for batch in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    results = []
    for _ in range(10):
        for stream, batch in zip(streams, batches, strict=True):
            with torch.cuda.stream(stream):
                results.append(operators.fipo_loss(*batch))
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        assert_same(result, expected[i % len(batches)])


def test_wrong_arguments_are_refused():
    batch = list(gpu_batch(1000, 1))
    batch[2] = batch[2].cpu()
    with pytest.raises(RuntimeError, match="advantage must be on the same GPU"):
        operators.fipo_loss(*batch)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    tests = "agree_with_the_cpu_kernels and 1- and (boundaries or misaligned or bf16 or lengths or weights)"
    command = [
        sanitizer,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-k",
        tests,
    ]
    run = subprocess.run([*command, str(Path(__file__))], capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


def test_bandwidth_against_a_copy():
    """Of the same number of bytes, measured beside it. The goal is 0.85; this only notices that something is broken."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
    import benchmark_gpu

    row = benchmark_gpu.measure_loss(16 << 20)
    assert row["share_of_copy"] > 0.6, row
