"""Weights as flattened buckets, and SGLang's parameters made of Hugging Face tensors."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.rollout.sglang.buckets import TensorSpec, fill_buckets, make_buffers, plan_buckets
from megatron_fipo.rollout.sglang.parameters import Checksums, name_mismatch, server_parameter

CPU = torch.device("cpu")


def tensors_of(shapes):
    g = torch.Generator().manual_seed(0)
    return [(f"t{i}", torch.randn(shape, generator=g).to(dtype)) for i, (shape, dtype) in enumerate(shapes)]


@given(
    shapes=st.lists(
        st.tuples(
            st.lists(st.integers(0, 5), max_size=3), st.sampled_from([torch.float32, torch.bfloat16, torch.int8])
        ),
        min_size=1,
        max_size=20,
    ),
    capacity=st.integers(1, 300),
)
def test_what_is_sent_is_what_is_rebuilt(shapes, capacity):
    """A receiver that knows only descriptions and bytes gets every tensor, in order and aligned."""
    named = tensors_of(shapes)
    buckets = plan_buckets([TensorSpec.of(*pair) for pair in named], capacity)
    rebuilt = []
    for bucket, data in fill_buckets(iter(named), buckets, make_buffers(buckets, capacity, CPU)):
        description, offset = bucket.description(), 0
        assert data.dtype == torch.uint8 and len(data) == bucket.nbytes
        assert bucket.nbytes <= capacity or len(bucket.specs) == 1
        for name, dtype, shape in zip(*(description[key] for key in ("names", "dtypes", "shapes")), strict=True):
            dtype = getattr(torch, dtype)
            nbytes = torch.empty(shape, dtype=dtype).nbytes
            assert offset % dtype.itemsize == 0
            rebuilt.append((name, data[offset : offset + nbytes].clone().view(dtype).view(shape)))
            offset += nbytes
        assert offset == len(data)
    assert [name for name, _ in rebuilt] == [name for name, _ in named]
    assert all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in zip(named, rebuilt, strict=True))


def test_two_buffers_take_turns():
    """While a bucket is on the wire the next is filled beside it, and no third one exists."""
    named = tensors_of([((100,), torch.float32)] * 6)
    buckets = plan_buckets([TensorSpec.of(*pair) for pair in named], 400)
    filled, on_wire, addresses = fill_buckets(iter(named), buckets, make_buffers(buckets, 400, CPU)), None, set()
    for (_, data), (_, tensor) in zip(filled, named, strict=True):
        if on_wire is not None:
            sent, value = on_wire
            assert torch.equal(sent.view(torch.float32), value), "overwritten before it arrived"
        on_wire = (data, tensor)
        addresses.add(data.data_ptr())
    assert len(buckets) == 6 and len(addresses) == 2


def test_a_tensor_larger_than_a_bucket_is_not_copied():
    named = tensors_of([((5,), torch.float32), ((30,), torch.float32), ((6,), torch.float32)])
    buckets = plan_buckets([TensorSpec.of(*pair) for pair in named], 40)
    buffers = make_buffers(buckets, 40, CPU)
    assert sum(len(buffer) for buffer in buffers) <= 80
    sent = [data.data_ptr() for _, data in fill_buckets(iter(named), buckets, buffers)]
    assert sent == [buffers[0].data_ptr(), named[1][1].data_ptr(), buffers[1].data_ptr()]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda named: named[:1] + [("other", named[1][1])], "other .* in the place of .*t1"),
        (lambda named: named[:1] + [("t1", torch.zeros(3))], r"t1 \[3\] in the place of"),
        (lambda named: named[:1] + [("t1", named[1][1].double())], "in the place of"),
        (lambda named: named[:1], "nothing .* in the place of .*t1"),
        (lambda named: [*named, ("more", torch.zeros(1))], "more beyond its list"),
    ],
)
def test_an_export_that_differs_from_its_list_is_refused(change, message):
    named = tensors_of([((4,), torch.float32), ((2, 2), torch.float32)])
    buckets = plan_buckets([TensorSpec.of(*pair) for pair in named], 1000)
    with pytest.raises(ValueError, match=message):
        list(fill_buckets(iter(change(named)), buckets, make_buffers(buckets, 1000, CPU)))


def test_names_become_sglang_parameters():
    layer = "model.layers.7"
    assert server_parameter("lm_head.weight") == ("lm_head.weight", (0, 0))
    assert server_parameter(f"{layer}.self_attn.v_proj.bias") == (f"{layer}.self_attn.qkv_proj.bias", (0, 2))
    assert server_parameter(f"{layer}.self_attn.q_norm.weight") == (f"{layer}.self_attn.q_norm.weight", (0, 0))
    assert server_parameter(f"{layer}.mlp.up_proj.weight") == (f"{layer}.mlp.gate_up_proj.weight", (0, 1))
    assert server_parameter(f"{layer}.mlp.gate.weight") == (f"{layer}.mlp.gate.weight", (0, 0))  # a router
    experts = f"{layer}.mlp.experts"
    assert server_parameter(f"{experts}.12.up_proj.weight") == (f"{experts}.w13_weight", (12, 1))
    assert server_parameter(f"{experts}.12.down_proj.weight") == (f"{experts}.w2_weight", (12, 0))


def test_names_are_compared_both_ways():
    theirs = ["model.embed_tokens.weight", "a.qkv_proj.weight", "model.norm.weight"]
    ours = ["model.embed_tokens.weight", "a.q_proj.weight", "a.k_proj.weight", "a.v_proj.weight", "model.norm.weight"]
    assert name_mismatch(ours, theirs) is None
    assert "no place for a.x_proj.weight" in name_mismatch([*ours, "a.x_proj.weight"], theirs)
    assert "trainer's model has no model.norm.weight" in name_mismatch(ours[:-1], theirs)


def test_checksums_of_fused_and_padded_parameters():
    """In whatever order the tensors come; experts are stacked, gate before up; the vocabulary is padded to 64 rows."""
    g = torch.Generator().manual_seed(1)
    names = [f"m.mlp.experts.{e}.{part}_proj.weight" for e in range(11) for part in ("gate", "up")]
    tensors = {name: torch.randn(3, 4, generator=g) for name in names} | {"lm_head.weight": torch.randn(93, 4)}
    sums = Checksums(tensors)
    for name in sorted(tensors):  # expert 10 before expert 2
        sums.add(name, tensors[name])
    stacked = torch.stack([torch.cat([tensors[names[2 * e]], tensors[names[2 * e + 1]]]) for e in range(11)])
    padded = torch.cat([tensors["lm_head.weight"], torch.zeros(35, 4)])
    expected = {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]
        for name, tensor in (("m.mlp.experts.w13_weight", stacked), ("lm_head.weight", padded))
    }
    assert [*sums.values.values()] == [expected] and sums.mismatch([expected]) is None
    assert "lm_head.weight of 2 parameters differ" in sums.mismatch([expected | {"lm_head.weight": "0"}])
    assert "2 ranks report" in sums.mismatch([expected, expected])
