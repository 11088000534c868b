"""The reference model's weights beside a policy on a GPU. Needs megatron-core and transformers besides."""

import gc

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)
for package in ("megatron.core", "transformers"):
    pytest.importorskip(package)


def test_pinned_memory_is_as_large_as_the_weights_and_is_given_back(build_model, hf_model):
    from megatron_fipo.model.reference import ReferenceWeights

    folder, other = (hf_model("qwen3", tied=True, seed=seed)[0] for seed in (0, 1))
    model, own, expected = (build_model(f) for f in (folder, folder, other))
    model[0].cuda()
    for _ in range(2):
        reference = ReferenceWeights(model, str(other))
        assert all(copy.is_pinned() for copy in reference._host)
        with reference.in_place():
            for parameter, wanted in zip(model[0].parameters(), expected[0].parameters(), strict=True):
                assert parameter.is_cuda and torch.equal(parameter.cpu(), wanted)
        for parameter, wanted in zip(model[0].parameters(), own[0].parameters(), strict=True):
            assert torch.equal(parameter.cpu(), wanted)
        copy = reference._host[0]
        del reference
        gc.collect()
        assert not copy.is_pinned()
