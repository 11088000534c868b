"""The reference model's weights in the policy's place, and the policy's own bits afterwards."""

import pytest
import torch
from test_model_logprob import pack, random_sequences

from megatron_fipo.checkpoint.hf import load_hf_weights
from megatron_fipo.errors import UserError
from megatron_fipo.model.logprob import packed_log_probs
from megatron_fipo.model.reference import ReferenceWeights, host_memory


def log_probs(model) -> torch.Tensor:
    with torch.no_grad():
        return packed_log_probs(model, pack(random_sequences([20, 9])), temperature=1.0, vocab_size=93)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("flags", [(), ("--bf16",)])
def test_weights_take_their_place_and_leave_it(build_model, hf_model, family, tied, flags):
    folder, other = (hf_model(family, tied=tied, seed=seed)[0] for seed in (0, 1))
    model, expected = (build_model(f, *flags) for f in (folder, other))
    with torch.no_grad():  # training has moved them, and one of them far
        for i, parameter in enumerate(model[0].parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
            parameter.view(-1)[i % parameter.numel()] = torch.nan if i == 3 else 1e-38
    bits = [parameter.detach().clone().view(torch.int8) for parameter in model[0].parameters()]
    places = [parameter.data_ptr() for parameter in model[0].parameters()]
    reference = ReferenceWeights(model, str(other))
    for _ in range(2):
        with reference.in_place():
            for parameter, wanted in zip(model[0].parameters(), expected[0].parameters(), strict=True):
                assert torch.equal(parameter, wanted) and not parameter.isnan().any()
            assert torch.equal(log_probs(model[0]), log_probs(expected[0]))
        for parameter, own, place in zip(model[0].parameters(), bits, places, strict=True):
            assert torch.equal(parameter.detach().view(torch.int8), own) and parameter.data_ptr() == place


def test_the_copies_cost_no_more_than_the_parameters():
    shapes = [((3, 5), torch.bfloat16), ((7,), torch.float32), ((1000, 33), torch.bfloat16), ((0,), torch.float32)]
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape, dtype in shapes]
    copies = host_memory(parameters)
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1
    assert copies[0].untyped_storage().nbytes() < sum(p.nbytes for p in parameters) + 64 * len(parameters)
    with torch.no_grad():
        for copy, parameter in zip(copies, parameters, strict=True):
            copy.copy_(parameter)
    assert all(map(torch.equal, copies, parameters)), "they overlap"
    assert all(copy.dtype == p.dtype and copy.data_ptr() % 64 == 0 for copy, p in zip(copies, parameters, strict=True))


def test_a_failed_pass_leaves_the_policy_its_weights(build_model, hf_model):
    folder, other = (hf_model("qwen3", tied=True, seed=seed)[0] for seed in (0, 1))
    model, fresh = build_model(folder), build_model(folder)
    with pytest.raises(RuntimeError, match="stop"), ReferenceWeights(model, str(other)).in_place():
        raise RuntimeError("stop")
    assert all(map(torch.equal, model[0].parameters(), fresh[0].parameters()))


def test_another_architecture_is_refused(build_model, hf_model):
    """Shapes that fit by their number of elements would be no excuse."""
    folder, other = hf_model("qwen3", tied=True)[0], hf_model("qwen3", tied=True, num_hidden_layers=2)[0]
    with pytest.raises(UserError, match="model.layers.2"):
        ReferenceWeights(build_model(folder), str(other))


def test_the_folder_is_read_again_at_every_start(build_model, hf_model):
    """A policy that has been trained does not become its own reference."""
    folder, other = (hf_model("qwen3", tied=True, seed=seed)[0] for seed in (0, 1))
    trained, model = build_model(other), build_model(folder)
    with ReferenceWeights(trained, str(folder)).in_place():
        assert torch.equal(log_probs(trained[0]), log_probs(model[0]))
    load_hf_weights(model, other)
    assert torch.equal(log_probs(trained[0]), log_probs(model[0]))


def test_forward_passes_keep_no_graph(build_model, hf_model):
    """Log-probs that carry one would hold every pack's activations until the step ends."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron_fipo.model.policy import Policy

    folder, other = (hf_model("qwen3", tied=True, seed=seed)[0] for seed in (0, 1))
    model = build_model(folder)[0]
    chunk = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-3), [chunk])
    policy = Policy([chunk], optimizer, None, 93, 1.0, 64, parallel_state.get_context_parallel_group())
    packs = [pack(random_sequences(lengths)) for lengths in ([20, 9], [13])]
    updates, entropy_sum = policy.add_old_log_probs([packs])
    updates = policy.add_reference_log_probs(updates, ReferenceWeights([chunk], str(other)))
    expected = build_model(other)[0]
    for batch in updates[0]:
        assert batch.old_logp_T.any() and batch.ref_logp_T.any() and not torch.equal(batch.old_logp_T, batch.ref_logp_T)
        assert not (batch.old_logp_T.requires_grad or batch.ref_logp_T.requires_grad or entropy_sum.requires_grad)
    torch.testing.assert_close(updates[0][0].ref_logp_T, log_probs(expected), rtol=0, atol=0)
