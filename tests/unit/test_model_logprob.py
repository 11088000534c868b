"""Packed log-probs: against transformers, and bitwise equal with and without gradients."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_fipo.data import packing
from megatron_fipo.data.packing import PackedBatch
from megatron_fipo.data.samples import Sample

UNEQUAL = [3, 400, 17, 2, 90, 360]  # attended in two groups
CASES = [("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False)]


def pack(sequences: list[list[int]]) -> PackedBatch:
    samples = [
        Sample(0, i, np.array(s, np.int32), np.ones(len(s), bool), np.zeros(len(s), np.float32), "stop", (), 0.0, False)
        for i, s in enumerate(sequences)
    ]
    return packing.pack(samples, range(len(samples)))


def random_sequences(lengths, vocab_size=93, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def reference(hf, sequence, temperature):
    logits = hf(torch.tensor([sequence[:-1]])).logits[0].float() / temperature
    logp = logits.log_softmax(-1)
    return logp.gather(1, torch.tensor(sequence[1:])[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_log_probs_and_entropy_equal_transformers(build_model, hf_model, family, tied):
    from megatron_fipo.model.logprob import packed_log_probs

    folder, hf = hf_model(family, tied=tied)
    model = build_model(folder)
    sequences = random_sequences(UNEQUAL)
    with torch.no_grad():
        logp, entropy = packed_log_probs(model[0], pack(sequences), temperature=0.7, vocab_size=93, with_entropy=True)
        wanted = [reference(hf, s, 0.7) for s in sequences]
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp, torch.cat([w[0] for w in wanted]), atol=1e-4, rtol=0)
    torch.testing.assert_close(entropy, torch.cat([w[1] for w in wanted]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("lengths", [UNEQUAL, [30, 31, 29], [50]])
def test_gradients_equal_transformers(build_model, hf_model, lengths):
    from megatron_fipo.model.logprob import packed_log_probs

    folder, hf = hf_model("qwen2", tied=True)
    model = build_model(folder)
    sequences = random_sequences(lengths)
    weight = torch.randn(sum(lengths) - len(lengths), generator=torch.Generator().manual_seed(1))
    hf.zero_grad()
    (torch.cat([reference(hf, s, 1.0)[0] for s in sequences]) * weight).sum().backward()
    (packed_log_probs(model[0], pack(sequences), temperature=1.0, vocab_size=93) * weight).sum().backward()
    for ours, theirs in [
        (model[0].embedding.word_embeddings.weight.grad[:93], hf.model.embed_tokens.weight.grad),
        (model[0].decoder.layers[0].mlp.linear_fc2.weight.grad, hf.model.layers[0].mlp.down_proj.weight.grad),
        (model[0].decoder.layers[2].input_layernorm.weight.grad, hf.model.layers[2].input_layernorm.weight.grad),
    ]:
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()) * 10, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("flags", [[], ["--bf16"]])
@pytest.mark.parametrize("lengths", [UNEQUAL, [30, 31, 29]])
def test_bitwise_equal_with_and_without_gradients(build_model, hf_model, family, flags, lengths):
    from megatron_fipo.model.logprob import packed_log_probs

    folder, _ = hf_model(family, tied=True)
    model = build_model(folder, *flags)[0]
    if flags:
        model.bfloat16()
    batch = pack(random_sequences(lengths))
    with torch.no_grad():
        old = packed_log_probs(model, batch, temperature=1.0, vocab_size=93)
    new = packed_log_probs(model, batch, temperature=1.0, vocab_size=93)
    assert new.requires_grad and not old.requires_grad
    assert torch.equal(old, new)


def test_prompts_get_zero_without_a_look_at_their_labels(build_model, hf_model):
    from megatron_fipo.model.logprob import packed_log_probs

    model = build_model(hf_model("qwen2", tied=False)[0])[0]
    batch = pack(random_sequences(UNEQUAL))
    upstream_T = torch.randn(batch.tokens_T.numel(), generator=torch.Generator().manual_seed(1))
    mask_T = torch.rand(upstream_T.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    mask_T[:2] = torch.tensor([False, True])

    def gradients(batch, upstream_T):
        model.zero_grad()
        logp_T, entropy_T = packed_log_probs(model, batch, temperature=0.7, vocab_size=93, with_entropy=True)
        (logp_T * upstream_T).sum().backward()
        return logp_T.detach(), entropy_T, {n: p.grad.clone() for n, p in model.named_parameters()}

    masked = dataclasses.replace(
        batch,
        response_mask_T=mask_T,
        response_R=mask_T.nonzero()[:, 0],
        labels_T=batch.labels_T.where(mask_T, -(2**40)),
    )
    all_logp_T, all_entropy_T, expected = gradients(batch, upstream_T.where(mask_T, 0.0))
    logp_T, entropy_T, found = gradients(masked, upstream_T)
    for values_T, all_values_T in ((logp_T, all_logp_T), (entropy_T, all_entropy_T)):
        assert not values_T[~mask_T].any()
        torch.testing.assert_close(values_T[mask_T], all_values_T[mask_T], atol=2e-6, rtol=0)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * scale, rtol=0, msg=name)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_main_gradients_gather_each_micro_batch_once(build_model, hf_model, tied, dtype, fused):
    """As DDP with the distributed optimizer accumulates them, with and without Megatron's fusion of the addition."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_fipo.model.logprob import packed_log_probs

    folder = hf_model("qwen2", tied=tied, vocab_size=300)[0]
    model = build_model(folder)[0].to(dtype)
    lengths = ([200, 90], [31, 20], [44, 150])  # the second micro-batch's logits fit in one tile
    batches = [pack(random_sequences(lengths[i], 300, i)) for i in range(3)]

    def accumulate(model, gradient_of):
        sums = {name: 0.0 for name, _ in model.named_parameters()}
        for batch in batches:
            logp_T = packed_log_probs(model, batch, temperature=1.0, vocab_size=300, tile_bytes=4 * 128**2)
            (logp_T * torch.linspace(-1, 1, logp_T.numel())).sum().backward()
            sums = gradient_of(model, sums)
        return sums

    def add_and_clear(model, sums):
        sums = {name: sums[name] + p.grad.float() for name, p in model.named_parameters()}
        model.zero_grad()
        return sums

    expected = accumulate(model, add_and_clear)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=True
    )
    wrapped = DistributedDataParallel(model.config, settings, model)
    model.config.gradient_accumulation_fusion = fused  # of the output layer alone: the other layers have read it
    wrapped.zero_grad_buffer()
    found = accumulate(wrapped.module, lambda model, _: {name: p.main_grad for name, p in model.named_parameters()})
    for name, gradient in expected.items():
        # Fused, the output layer's share skips the rounding to bf16.
        tolerance = 1e-6 if dtype == torch.float32 else 2**-7 if fused else 0.0
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(
            found[name], gradient, atol=tolerance * float(gradient.abs().max()), rtol=0, msg=name
        )
