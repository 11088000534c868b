"""Updates take the experts that old_logp's pass took, also where activations are recomputed."""

import pytest
import torch
from test_model_logprob import pack, random_sequences

PACKS = [pack(random_sequences(lengths, seed=seed)) for seed, lengths in enumerate(([30, 12], [9, 41, 20]))]


def log_probs(model, batch):
    from megatron_fipo.model.logprob import packed_log_probs

    return packed_log_probs(model, batch, temperature=1.0, vocab_size=93)


def perturb_routers(model):
    """Enough to send most tokens elsewhere."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture
def routing_maps(request):
    """maps(model): the [tokens, experts] choices of each router in each further forward pass, in order."""
    from megatron.core.transformer.moe.router import TopKRouter

    def watch(model):
        seen = []
        for module in model.modules():
            if isinstance(module, TopKRouter):
                handle = module.register_forward_hook(lambda m, i, out: seen.append(out[1].clone()))
                request.addfinalizer(handle.remove)
        return seen

    return watch


def record_all(replay, model):
    from megatron_fipo.model.router_replay import RoutingRecord

    records = [RoutingRecord() for _ in PACKS]
    old = []
    for batch, record in zip(PACKS, records, strict=True):
        with torch.no_grad(), replay.recording(model, record):
            old.append(log_probs(model, batch))
    return records, old


def test_updates_route_as_recorded_after_the_weights_have_moved(build_model, hf_model, routing_maps):
    from megatron_fipo.model.router_replay import RoutingReplay

    model = build_model(hf_model("qwen3_moe", tied=False)[0])[0].train()
    replay, maps = RoutingReplay([model]), routing_maps(model)
    records, old = record_all(replay, model)
    recorded = [m.clone() for m in maps]
    assert len(recorded) == len(PACKS) * 2 and records[0].experts[0][0].dtype == torch.uint8

    for batch, record, old_T in zip(PACKS, records, old, strict=True):
        with replay.replaying(model, record):
            assert torch.equal(log_probs(model, batch), old_T), "the first update's ratios are exactly 1"
    perturb_routers(model)
    maps.clear()
    replayed = []
    for batch, record in zip(PACKS, records, strict=True):
        with replay.replaying(model, record):
            replayed.append(log_probs(model, batch).detach())
    assert all(map(torch.equal, maps, recorded)) and len(maps) == len(recorded)

    replay.clear()
    maps.clear()
    free = [log_probs(model, batch).detach() for batch in PACKS]
    flipped = sum(int((a != b).any(1).sum()) for a, b in zip(maps, recorded, strict=True))
    assert flipped > 20, "the perturbation sends tokens elsewhere"
    for free_T, replayed_T, old_T in zip(free, replayed, old, strict=True):
        assert not torch.equal(replayed_T, old_T), "the experts' weights follow the router"
        assert (free_T - old_T).abs().mean() > 1.5 * (replayed_T - old_T).abs().mean()


def test_recomputation_routes_as_its_forward_pass(build_model, hf_model, routing_maps):
    """Both forward passes come first, as in a pipeline: each backward pass must find its own pack's experts."""
    from megatron_fipo.model.router_replay import RoutingReplay

    gradients = []
    for flags in ("", "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"):
        model = build_model(hf_model("qwen3_moe", tied=False)[0], *flags.split())[0].train()
        replay, maps = RoutingReplay([model]), routing_maps(model)
        records, _ = record_all(replay, model)
        perturb_routers(model)
        recorded = [m.clone() for m in maps]
        maps.clear()
        losses = []
        for batch, record in zip(PACKS, records, strict=True):
            with replay.replaying(model, record):
                losses.append(log_probs(model, batch).sum())
        for loss in losses:
            loss.backward()
        replay.clear()
        passes = maps[4:] and [maps[4:6], maps[6:8]]  # layers are recomputed last to first
        assert all(map(torch.equal, maps[:4], recorded))
        assert bool(passes) == bool(flags)
        for again, first in zip(passes, (recorded[:2], recorded[2:]), strict=False):
            assert all(map(torch.equal, again, reversed(first)))
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    assert any(g.any() for name, g in gradients[0].items() if "router" in name), "the router learns under replay"


def test_a_pack_without_a_record_is_an_error_and_a_dense_model_needs_none(build_model, hf_model):
    from megatron_fipo.model.router_replay import RoutingRecord, RoutingReplay

    model = build_model(hf_model("qwen3_moe", tied=False)[0])[0]
    with pytest.raises(KeyError), RoutingReplay([model]).replaying(model, RoutingRecord()):
        pass
    dense = build_model(hf_model("qwen3", tied=False)[0])[0]
    replay = RoutingReplay([dense])
    records, old = record_all(replay, dense)
    with replay.replaying(dense, records[0]):
        assert torch.equal(log_probs(dense, PACKS[0]), old[0])
    assert records[0].experts == {0: ()}
    replay.clear()
