"""The operators as torch sees them: schema, fake kernels, autograd, torch.compile; and the library's loading."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_fipo import _host
from megatron_fipo.loss import FipoConfig, fipo_loss
from megatron_fipo.ops import future_kl_aggregate, library, packed

operators = library.operators
SETTINGS = (2 ** (-1 / 32), 0.8, 1.2, 4.0, 3.0, 0.2, 0.28)


def make_batch(lengths, padding=0, seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = sum(lengths) + padding
    logp = -torch.rand(tokens, generator=g)
    old_logp = logp + 0.5 * torch.randn(tokens, generator=g)
    mask = torch.rand(tokens, generator=g) < 0.9
    cu = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    return logp, old_logp, torch.randn(len(lengths), generator=g), mask, cu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_carry", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
def test_opcheck_scan(dtype, with_carry, reverse):
    x = torch.randn(30, dtype=dtype, requires_grad=True)
    carry = torch.randn(3, dtype=torch.float64, requires_grad=True) if with_carry else None
    cu = torch.tensor([0, 10, 10, 28], dtype=torch.int32)
    torch.library.opcheck(operators.discounted_scan.default, (x, cu, 0.9, reverse, carry))
    torch.library.opcheck(
        operators.discounted_scan_out.default,
        (x.detach(), cu, 0.9, reverse, None if carry is None else carry.detach(), torch.empty(30, dtype=dtype)),
    )


@pytest.mark.parametrize("paper", [True, False])
@pytest.mark.parametrize("optional", [True, False])
def test_opcheck_fipo_loss(paper, optional):
    logp, old_logp, advantage, mask, cu = make_batch([5, 0, 100, 3], padding=2)
    token_weight = torch.rand_like(logp) if optional else None
    carry = torch.randn(4, dtype=torch.float64) if optional else None
    if optional:
        advantage = torch.randn_like(logp)
    torch.library.opcheck(
        operators.fipo_loss.default,
        (logp.requires_grad_(), old_logp, advantage, mask, cu, token_weight, carry, optional, *SETTINGS, paper),
    )
    buffers = torch.empty(2, logp.shape[0])
    torch.library.opcheck(
        operators.fipo_loss_out.default,
        (logp.detach(), old_logp, advantage, mask, cu, token_weight, carry, optional, *SETTINGS, paper, *buffers),
    )


@pytest.mark.parametrize("per_token", [True, False])
def test_opcheck_of_the_rest(per_token):
    logp, old_logp, advantage, mask, cu = make_batch([5, 0, 100, 3], padding=2)
    if per_token:
        advantage = torch.randn_like(logp)
    torch.library.opcheck(
        operators.future_kl_aggregate.default,
        (logp, old_logp, advantage, mask, cu, per_token, 0.9, 3.0, 0.2, 0.28),
    )
    torch.library.opcheck(operators.scale_per_sequence.default, (logp, torch.randn(4, dtype=torch.float64), cu))


def test_compile_of_the_operators_is_one_graph():
    logp, old_logp, advantage, mask, cu = make_batch([5, 0, 1000, 3], padding=2)

    def loss(logp):
        per_sequence, counts, *_ = operators.fipo_loss(
            logp * 1.0, old_logp, advantage, mask, cu, None, None, False, *SETTINGS, False
        )
        return (
            torch.where(counts[:, 1] <= 1, per_sequence, 0.0).sum()
            + operators.discounted_scan(logp, cu, 0.9, True, None).sum().double()
        )

    eager, compiled = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    loss(eager).backward()
    torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")(compiled).backward()
    assert torch.equal(eager.grad, compiled.grad) and eager.grad.any()


@pytest.mark.parametrize("backend", ["torch", "compiled"])
def test_compile_of_the_whole_loss_is_one_graph(backend):
    logp, *rest = make_batch([5, 0, 100, 3], padding=2)

    def loss(logp):
        return fipo_loss(logp, *rest, FipoConfig.preset("fipo-7b"), backend=backend).loss

    eager, compiled = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    loss(eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(eager.grad, compiled.grad)
    assert eager.grad.any()


def test_bfloat16_log_probs_give_the_loss_of_their_values():
    logp, old_logp, *rest = make_batch([50, 3])
    logp, old_logp = logp.bfloat16(), old_logp.bfloat16()
    halves, floats = logp.clone().requires_grad_(), logp.float().requires_grad_()
    out = fipo_loss(halves, old_logp, *rest, FipoConfig())
    expected = fipo_loss(floats, old_logp.float(), *rest, FipoConfig())
    out.loss.backward(), expected.loss.backward()
    assert out.loss.dtype == torch.float32 and halves.grad.dtype == torch.bfloat16
    assert torch.equal(out.loss, expected.loss) and torch.equal(halves.grad, floats.grad.bfloat16())


def test_results_do_not_depend_on_the_number_of_threads():
    """Long sequences too: the cut into blocks is fixed."""
    batch = make_batch([3, 60_000, 1, 33_000, 9000, 0, 20_000])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            logp = batch[0].clone().requires_grad_()
            out = fipo_loss(logp, *batch[1:], FipoConfig.preset("fipo-7b"))
            out.loss.backward()
            results.append((out.loss, out.weights_T, logp.grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_long_sequences_equal_the_torch_backend():
    batch = make_batch([40_000, 70_000, 5])
    cfg = FipoConfig(half_life=2048.0, weight_low=0.0, weight_high=10.0, sequence_filter=False)
    results = []
    for backend in ("torch", "compiled"):
        logp = batch[0].clone().requires_grad_()
        out = fipo_loss(logp, *batch[1:], cfg, backend=backend)
        out.loss.backward()
        results.append((out.loss, logp.grad, out.weights_T))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 3e-5 * a.abs().max()


@pytest.mark.parametrize("backend", ["torch", "compiled"])
def test_a_sequence_cut_in_two(backend):
    """What context parallelism needs: the second half's aggregate is the first half's carry, and counts add up."""
    logp, old_logp, advantage, mask, cu = make_batch([100])
    advantage = -advantage.abs()
    cfg = FipoConfig(weight_low=0.5, weight_high=2.0, dual_clip=1.5, half_life=64.0)

    def part(tokens):
        length = torch.tensor([0, tokens.stop - tokens.start])
        return logp[tokens], old_logp[tokens], advantage, mask[tokens], length

    def aggregate(tokens):
        return future_kl_aggregate(
            *part(tokens), advantage_is_per_token=False, gamma=cfg.gamma, dual_clip=cfg.dual_clip,
            clip_low=cfg.clip_low, clip_high=cfg.clip_high,
        )  # fmt: skip

    whole, first, second = slice(0, 100), slice(0, 60), slice(60, 100)
    (F_whole, beyond_whole), (F_first, beyond_first), (F_second, beyond_second) = map(aggregate, (whole, first, second))
    torch.testing.assert_close(F_first + cfg.gamma**60 * F_second, F_whole, rtol=1e-6, atol=1e-7)
    assert F_whole.dtype == torch.float32 and beyond_whole.dtype == torch.int32
    assert beyond_first + beyond_second == beyond_whole > 1

    expected = fipo_loss(*part(whole), cfg, beyond_c_S=torch.zeros(1, dtype=torch.int64), backend=backend)
    halves = [
        fipo_loss(*part(tokens), cfg, carry_S=carry, beyond_c_S=torch.ones(1, dtype=torch.int32), backend=backend)
        for tokens, carry in ((first, F_second), (second, None))
    ]
    weights = torch.cat([half.weights_T for half in halves])
    torch.testing.assert_close(weights, expected.weights_T, rtol=2e-6, atol=1e-6)
    assert (weights[50:60] != fipo_loss(*part(first), cfg, backend=backend).weights_T[50:60]).any()  # the carry counts
    torch.testing.assert_close(sum(half.loss_sum for half in halves), expected.loss_sum, rtol=1e-6, atol=0)
    dropped = fipo_loss(*part(second), cfg, beyond_c_S=beyond_whole, backend=backend)
    assert dropped.denominator == dropped.loss == 0 != expected.loss


def test_expand_to_tokens_and_sequence_of_token():
    cu = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    assert packed.sequence_of_token(cu, 5).tolist() == [0, 0, 2, 3, 3]
    assert packed.expand_to_tokens(torch.tensor([1.0, 2.0, 3.0]), cu, 5).tolist() == [1, 1, 3, 0, 0]
    assert packed.sum_per_sequence(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), cu).tolist() == [3, 0, 3]


def test_missing_library_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_PACKAGE", tmp_path)
    with pytest.raises(ImportError, match="run `make env`") as error:
        library._load()
    assert str(tmp_path) in str(error.value)


def test_host_module_tells_what_was_built():
    info = _host.build_info()
    assert "-O3" in info["flags"] and info["torch_target_version"] == "2.10" and isinstance(info["cuda"], tuple)
    assert info["compiler"].startswith(("gcc", "clang"))
    capability = _host.cpu_capability()
    assert capability["selected"] in capability["built"] and "portable" in capability["built"]
    assert capability["offered"] in ("portable", "avx2", "avx512")


def test_unknown_cpu_capability_is_refused():
    code = "from megatron_fipo import _host; print(_host.cpu_capability()['selected'])"

    def run(value):
        env = os.environ | {"MEGATRON_FIPO_CPU": value}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)

    assert run("portable").stdout.strip() == "portable"
    refused = run("mmx")
    assert refused.returncode != 0 and "MEGATRON_FIPO_CPU=mmx" in refused.stderr
