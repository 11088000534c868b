#!/usr/bin/env python
"""The fused FIPO loss with gradient and metrics against torch and against a stream of the same bytes, in one process.

    python tools/benchmark_loss.py [--json FILE] [--threads 2] [--quick]

Keys: loss_over_stream: share of the speed at which the same bytes can be streamed (9 read, 8 written for each token;
the faster of plain stores and stores past the caches), buffers reused, out of cache, the lower of 2048 x 8192 and 10
million ragged tokens. eager_over_loss, compiled_over_loss: torch's forward and backward with the same metrics, over
ours through autograd, at 64 x 8192. Torch's loss uses our scan: its own ways take thousands of times longer
(benchmark_scan.py).
"""

import math

import torch
from benchmarks import packs
from benchmarks.measure import interleave, parse_arguments, print_table, ratio, rows, write_report
from benchmarks.native import Native

from megatron_fipo.loss import FipoConfig, fipo_loss
from megatron_fipo.ops import discounted_scan, fused_fipo_loss

BYTES = 17  # logp, old_logp, mask in; gradient and weight out
CONFIG = FipoConfig()
OURS, OURS_FRESH, OURS_TRAINING = "fused, buffers reused", "fused, fresh outputs", "forward + backward"


def make_inputs(pack: packs.Pack) -> dict[str, torch.Tensor]:
    """Every token a response token, so that ours has no byte less to move than the stream."""
    generator = torch.Generator().manual_seed(0)
    logp_T = -torch.rand(pack.tokens, generator=generator)
    return {
        "logp_T": logp_T,
        "old_logp_T": logp_T + 0.05 * torch.randn(pack.tokens, generator=generator),
        "advantage": torch.randn(pack.sequences, generator=generator),
        "response_mask_T": torch.ones(pack.tokens, dtype=torch.bool),
        "cu_seqlens_S1": pack.cu_seqlens_S1,
    }


def fused(inputs: dict[str, torch.Tensor], out=None):
    return fused_fipo_loss(
        **inputs, advantage_is_per_token=False, gamma=CONFIG.gamma, weight_low=CONFIG.weight_low,
        weight_high=CONFIG.weight_high, safety_threshold=CONFIG.safety_threshold, dual_clip=CONFIG.dual_clip,
        clip_low=CONFIG.clip_low, clip_high=CONFIG.clip_high, paper=False, out=out,
    )  # fmt: skip


def torch_loss(logp_BL, old_logp_BL, advantage_B1, mask_BL, cu_seqlens_S1):
    """The loss as one writes it on padded rows, with the sums and extrema that the metrics need."""
    c, zero = CONFIG.dual_clip, torch.zeros((), dtype=logp_BL.dtype)
    d = torch.where(mask_BL, logp_BL - old_logp_BL, zero).clamp(-20, 20)
    r = d.exp()
    negative, positive = mask_BL & (advantage_B1 < 0), mask_BL & (advantage_B1 > 0)
    with torch.no_grad():
        x = torch.where(d <= math.log(c), d, zero)
        F = discounted_scan(x.view(-1), cu_seqlens_S1, CONFIG.gamma).view(x.shape)
        raw_f = F.exp()
        f = raw_f.clamp(CONFIG.weight_low, CONFIG.weight_high)
        f = torch.where(negative & (r > CONFIG.safety_threshold), f.clamp(0.8, 1.0), f)
    w = advantage_B1 * f
    loss = torch.maximum(-w * r, -w * r.clamp(1 - CONFIG.clip_low, 1 + CONFIG.clip_high))
    beyond_c = negative & (r > c)
    loss = torch.where(beyond_c, -w * c, loss)
    kept = mask_BL & (beyond_c.sum(1, keepdim=True) <= 1)
    mean = torch.where(kept, loss, zero).sum() / kept.sum().clamp(min=1)
    with torch.no_grad():
        counts = [
            mask_BL, positive & (r > 1 + CONFIG.clip_high) | negative & (r < 1 - CONFIG.clip_low), beyond_c,
            mask_BL & (f >= CONFIG.weight_high), mask_BL & (f <= CONFIG.weight_low), mask_BL & (f != 1),
            negative & (r >= 2) & (r < 3), negative & (r >= 3) & (r < 4), negative & (r >= 4) & (r < c),
            positive & (r < 1e-3),
        ]  # fmt: skip
        sums = [torch.where(mask_BL, values, zero).sum() for values in (d, f, raw_f)]
        extrema = [
            bound
            for values, where in ((f, mask_BL), (raw_f, mask_BL), (d, negative), (d, positive))
            for bound in (torch.where(where, values, math.inf).amin(), torch.where(where, values, -math.inf).amax())
        ]
        metrics = torch.stack([count.sum().float() for count in counts] + sums + extrema)
    return mean, metrics


def measure_streaming(pack: packs.Pack, native: Native, seconds: float) -> dict[str, list[float]]:
    inputs = make_inputs(pack)
    buffers = torch.zeros(pack.tokens), torch.zeros(pack.tokens)  # touched, and aligned as streaming wants it
    plain = [inputs[name] for name in ("logp_T", "old_logp_T", "response_mask_T")]
    return interleave(
        {
            OURS: lambda: fused(inputs, buffers),
            OURS_FRESH: lambda: fused(inputs),
            "stream": lambda: native.stream(*plain, *buffers, pack.tokens),
            "stream past the caches": lambda: native.stream_streaming(*plain, *buffers, pack.tokens),
        },
        seconds=seconds,
    )


def measure_training(pack: packs.Pack, seconds: float) -> dict[str, list[float]]:
    inputs = make_inputs(pack)
    logp_T, cu_seqlens_S1 = inputs.pop("logp_T").requires_grad_(), inputs["cu_seqlens_S1"]
    rows_BL = [
        inputs["old_logp_T"].view(pack.shape),
        inputs["advantage"][:, None],
        inputs["response_mask_T"].view(pack.shape),
    ]

    def backward(loss: torch.Tensor) -> torch.Tensor:
        logp_T.grad = None
        loss.backward()
        return logp_T.grad

    def ours():
        out = fipo_loss(logp_T, config=CONFIG, **inputs)
        return backward(out.loss), out.token_statistics_K

    def peer(function):
        def call():
            loss, metrics = function(logp_T.view(pack.shape), *rows_BL, cu_seqlens_S1)
            return backward(loss), metrics

        return call

    calls = {OURS_TRAINING: ours, "torch eager": peer(torch_loss), "torch.compile": peer(torch.compile(torch_loss))}
    expected = ours()[0]
    for name in ("torch eager", "torch.compile"):  # a peer that computes something else would be no peer
        torch.testing.assert_close(calls[name]()[0], expected, rtol=1e-4, atol=1e-9, msg=name)
    return interleave(calls, seconds=seconds)


def main() -> None:
    arguments = parse_arguments(__doc__)
    torch.set_num_threads(arguments.threads)
    seconds, native, table, over_stream = 0.0 if arguments.quick else 10.0, Native(), [], {}

    for pack in (packs.equal_lengths(2048, 8192), packs.ragged(10_000_000), packs.equal_lengths(64, 8192)):
        samples = measure_streaming(pack, native, seconds)
        over_stream[pack.name] = min(ratio(samples, name, OURS) for name in ("stream", "stream past the caches"))
        table += rows(pack.name, samples, ours=OURS, tokens=pack.tokens, bytes_per_token=BYTES)
        print_table(f"{pack.name}, {arguments.threads} threads", table[-len(samples) :])
    in_cache = pack
    del over_stream[in_cache.name]

    samples = measure_training(in_cache, seconds)
    training = rows(
        f"{in_cache.name}, training", samples, ours=OURS_TRAINING, tokens=in_cache.tokens, bytes_per_token=BYTES
    )
    print_table(f"{in_cache.name}, forward + backward with metrics, {arguments.threads} threads", training)
    ratios = {
        "loss_over_stream": min(over_stream.values()),
        "compiled_over_loss": ratio(samples, "torch.compile", OURS_TRAINING),
        "eager_over_loss": ratio(samples, "torch eager", OURS_TRAINING),
    }
    write_report(arguments.json, ratios, table + training, packs.environment())


if __name__ == "__main__":
    main()
