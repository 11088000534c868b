"""Packed log-probs: against transformers, and bitwise equal with and without gradients."""

import pytest
import torch

from megatron_fipo.data.packing import PackedBatch

UNEQUAL = [3, 400, 17, 2, 90, 360]  # attended in two groups
CASES = [("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False)]


def pack(sequences: list[list[int]]) -> PackedBatch:
    lengths = torch.tensor([len(s) - 1 for s in sequences])
    cu = torch.zeros(len(sequences) + 1, dtype=torch.int32)
    cu[1:] = lengths.cumsum(0)
    total, count = int(lengths.sum()), len(sequences)
    return PackedBatch(
        tokens_T=torch.tensor([t for s in sequences for t in s[:-1]]),
        labels_T=torch.tensor([t for s in sequences for t in s[1:]]),
        position_ids_T=torch.cat([torch.arange(n) for n in lengths]),
        response_mask_T=torch.ones(total, dtype=torch.bool),
        rollout_logp_T=torch.zeros(total),
        old_logp_T=None,
        advantage_S=torch.ones(count),
        loss_scale_S=None,
        cu_seqlens_S1=cu,
        cu_seqlens_padded_S1=cu,
        sample_ids_S=torch.arange(count),
        group_ids_S=torch.arange(count),
    )


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


def test_groups_cover_every_token_once_and_bound_the_waste():
    from megatron_fipo.model.attention import padded_groups

    generator = torch.Generator().manual_seed(0)
    for call_cost in (0.0, 1000.0, 50_000.0, 1e12):
        for _ in range(20):
            count = int(torch.randint(1, 40, (), generator=generator))
            lengths = torch.randint(0, 200, (count,), generator=generator).tolist()
            cu = tuple(sum(lengths[:i]) for i in range(count + 1))
            groups = padded_groups(cu, call_cost)
            covered = [t for _, _, pack_index, _ in groups for t in pack_index.tolist()]
            assert sorted(covered) == list(range(cu[-1]))
            squares = sum(n * n for n in lengths)
            assert sum(rows * longest**2 for rows, longest, _, _ in groups) <= squares + len(groups) * call_cost
            for rows, longest, pack_index, padded_index in groups:
                assert padded_index.unique().numel() == padded_index.numel() == pack_index.numel()
                assert int(padded_index.max()) < rows * longest
            assert len(groups) <= (1 if call_cost == 1e12 else count)
