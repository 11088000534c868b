"""Megatron still has everything that we patch or use, and the patches do what they say."""

import pytest
import torch


def test_every_patched_symbol_exists(megatron):
    from megatron_fipo import compat
    from megatron_fipo.compat import no_te

    patches = compat.needed_patches()
    assert {(p.module, p.symbol) for p in patches} >= set(no_te.PATCHED if no_te.is_needed() else ())
    for patch in patches:
        patch.target()  # raises if the symbol is gone
        assert patch.why
    assert len({(p.module, p.symbol) for p in patches}) == len(patches)


def test_a_missing_symbol_is_named_and_nothing_is_replaced():
    from megatron_fipo.compat.patching import Patch, apply

    before = torch.zeros
    with pytest.raises(AttributeError, match="torch has no no_such_thing"):
        apply([Patch("torch", "zeros", "", lambda old: None), Patch("torch", "no_such_thing", "", lambda old: None)])
    assert torch.zeros is before


@pytest.mark.skipif(torch.cuda.is_available(), reason="no_cuda is for machines without CUDA")
def test_torch_itself_is_not_changed_where_it_worked(megatron):
    assert torch.cuda.device_count() == 0
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")


@pytest.fixture
def distributed_optimizer(build_model, hf_model):
    """A small model under DDP, its distributed optimizer on torch's Adam, and a function that makes one update."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    model = build_model(hf_model("qwen2", tied=True)[0])[0]
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True), model
    )
    chained = get_megatron_optimizer(OptimizerConfig(lr=1e-2, use_distributed_optimizer=True), [wrapped])

    def update():
        wrapped.zero_grad_buffer()
        tokens = torch.arange(3, 23)[None]
        wrapped(tokens, torch.arange(20)[None], None, labels=tokens).mean().backward()
        wrapped.finish_grad_sync()
        assert chained.step()[0]

    return chained.chained_optimizers[0], update


def steps_of(optimizer):
    return [float(state["step"]) for state in optimizer.optimizer.state.values()]


def test_optimizer_state_can_be_loaded_before_the_first_step_and_steps_advance_singly(distributed_optimizer):
    optimizer, update = distributed_optimizer
    optimizer.load_state_dict(optimizer.state_dict())
    assert set(steps_of(optimizer)) == {0.0} and len(steps_of(optimizer)) > 10
    update()
    assert set(steps_of(optimizer)) == {1.0}
    optimizer.load_state_dict(optimizer.state_dict())
    update()
    assert set(steps_of(optimizer)) == {2.0}


def test_sharded_optimizer_state_is_restored_without_a_step(distributed_optimizer):
    optimizer, update = distributed_optimizer
    update()
    parameter = next(iter(optimizer.model_param_group_index_map))
    saved = {k: v.clone() for k, v in optimizer._get_main_param_and_optimizer_states(parameter).items()}
    del saved["step"]  # sharded checkpoints keep it in the parameter group
    update()
    optimizer._set_main_param_and_optimizer_states(parameter, saved)
    restored = optimizer._get_main_param_and_optimizer_states(parameter)
    assert {"param", "exp_avg", "exp_avg_sq"} <= saved.keys()
    assert all(torch.equal(restored[k], saved[k]) for k in saved)
    assert float(restored["step"]) == 2.0
