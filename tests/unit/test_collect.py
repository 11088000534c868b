"""Dynamic sampling with the real engine on a model that is right one time in sixteen."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from megatron_fipo.data.prompts import PromptStream, read_prompts
from megatron_fipo.errors import UserError
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rewards.answers import Answers
from megatron_fipo.rewards.pool import RewardPool
from megatron_fipo.rollout.collect import CollectSettings, OutOfContrast, collect
from megatron_fipo.rollout.embedded import EmbeddedEngine
from megatron_fipo.rollout.engine import SamplingParams
from megatron_fipo.rollout.leftovers import Leftovers
from megatron_fipo.rollout.replay import read_rollout, write_rollout
from megatron_fipo.rollout.responder import SingleTurn
from megatron_fipo.rollout.rollout import has_contrast


@pytest.fixture(scope="module")
def run(trained_base, build_model):
    """run(settings changes..., cursor=, contrast_rate=) -> (rollout, stream, completions reported)."""
    tokenizer = AutoTokenizer.from_pretrained(trained_base)
    prompts = read_prompts([str(trained_base / "train.jsonl")], tokenizer.encode)
    engine = EmbeddedEngine(build_model(trained_base), len(tokenizer), 64, pad_id=0)
    answers = Answers(tokenizer, (tokenizer.eos_token_id,), RewardPool())
    settings = CollectSettings(
        prompts_per_step=6, group_size=8, sampling=SamplingParams(12, 1.0, 1.0, answers.stop_token_ids), seed=1,
        dynamic_sampling=True, max_batches=10, overlong_buffer=0, overlong_penalty=1.0,
    )  # fmt: skip

    def collected(cursor=0, contrast_rate=1.0, max_tokens=12, version=7, leftovers=None, **changes):
        changes["sampling"] = replace(settings.sampling, max_tokens=max_tokens)
        stream, reported = PromptStream(prompts, seed=1, cursor=cursor), []
        rollout = collect(
            SingleTurn(engine), stream, answers.verify, replace(settings, **changes), Replicas.current(),
            version=version, contrast_rate=contrast_rate, on_finished=reported.append, leftovers=leftovers,
        )  # fmt: skip
        return rollout, stream, sum(reported)

    return collected


def test_kept_groups_are_the_first_ones_with_contrast(run):
    rollout, stream, reported = run()
    contrast = has_contrast(rollout.table)
    assert list(rollout.kept) == contrast.nonzero()[:6, 0].tolist()
    assert rollout.batches > 1, "the first batch alone had enough contrast: the test shows nothing"
    assert stream.cursor == len(rollout.table) and reported == 8 * len(rollout.table)
    for group in torch.tensor([rollout.held[i].correct for i in range(48)]).view(6, 8):
        assert 0 < group.sum() < 8


def test_samples_say_what_they_are(run):
    rollout, _, _ = run(cursor=40)
    for number, sample in rollout.held.items():
        assert sample.group_id == rollout.group_ids_S[number] == 40 + rollout.kept[number // 8]
        assert sample.reward == rollout.reward_S[number] == (1.0 if sample.correct else -1.0)
        assert len(sample.tokens) - 1 == rollout.packed_length_S[number]
        assert sample.response_mask.sum() == rollout.response_tokens_S[number]
        assert (sample.rollout_logp[~sample.response_mask] == 0).all()
        assert (sample.rollout_logp[sample.response_mask] < 0).all()
        assert sample.weight_versions == ((7, 0, sample.response_mask.sum()),)


def test_the_same_cursor_gives_the_same_rollout_and_another_does_not(run):
    tokens = [[s.tokens.tolist() for s in run(cursor=c)[0].held.values()] for c in (0, 0, 100)]
    assert tokens[0] == tokens[1] != tokens[2]


def test_the_expected_rate_saves_batches(run):
    patient, informed = (run(contrast_rate=rate, prompts_per_step=4)[0] for rate in (1.0, 0.34))
    assert informed.batches < patient.batches
    assert informed.kept == patient.kept


def test_leftovers_come_first_and_no_group_is_lost_or_repeated(run):
    """Three steps of four groups use what one step of twelve uses: the same groups in the same order."""
    whole, _, _ = run(prompts_per_step=12)
    cursor, rate, leftovers, used, carried = 0, 0.34, None, [], []
    for version in (7, 8, 9):
        rollout, stream, reported = run(
            cursor, rate, version=version, leftovers=leftovers, prompts_per_step=4, max_batches=20
        )
        before, cursor, rate = cursor, stream.cursor, 0.34
        assert reported == 8 * (cursor - before) == len(rollout.generated.reward)
        assert rollout.carried == (len(leftovers.visits) if leftovers else 0)
        stale, fresh = [version - 1] * rollout.stale_samples, [version] * (32 - rollout.stale_samples)
        assert [rollout.held[i].weight_versions[0][0] for i in range(32)] == stale + fresh
        assert rollout.contrast_rate == has_contrast(rollout.table[rollout.carried :]).double().mean()
        for number, sample in rollout.held.items():
            assert sample.group_id == rollout.group_ids_S[number] and sample.reward == rollout.reward_S[number]
        used += rollout.group_ids_S[::8].tolist()
        carried.append(rollout.carried)
        leftovers = rollout.leftovers
    assert used == whole.group_ids_S[::8].tolist()
    assert carried[0] == 0 and max(carried) > 0, "nothing was left over: the test shows nothing"


def test_a_step_generates_even_if_enough_is_left_over(run):
    """Else samples could get older than one step; what is too much is dropped."""
    rich, stream, _ = run(prompts_per_step=6, max_batches=20)
    poor, stream, _ = run(stream.cursor, prompts_per_step=2, leftovers=as_leftovers(rich), max_batches=20)
    assert poor.carried == 1 and len(poor.table) > 1 and poor.batches >= 1
    assert poor.group_ids_S[0] == rich.group_ids_S[0] and poor.group_ids_S[-1] >= len(rich.table)


def as_leftovers(rollout) -> Leftovers:
    """All that a step trained on, as if it had been left over."""
    visits = tuple(rollout.group_ids_S[::8].tolist())
    held = {visit: [rollout.held[8 * i + k] for k in range(8)] for i, visit in enumerate(visits)}
    return Leftovers(visits, rollout.table[list(rollout.kept)], held)


def test_it_gives_up_with_a_reason(run):
    with pytest.raises(OutOfContrast, match=r"only \d of 6 groups .* after 1 generation batches .accuracy 0\.\d+"):
        run(max_batches=1)


def test_without_dynamic_sampling_every_group_is_kept(run):
    rollout, _, _ = run(dynamic_sampling=False)
    assert rollout.kept == tuple(range(6)) and rollout.batches == 1


def test_long_responses_cost_reward(run):
    rollout, _, _ = run(overlong_buffer=11, dynamic_sampling=False)
    length = rollout.response_tokens_S
    expected = torch.tensor([1.0 if rollout.held[i].correct else -1.0 for i in range(48)]) - (length - 1).clamp(0) / 11
    torch.testing.assert_close(rollout.reward_S, expected)


def test_the_overlong_filter_takes_truncated_responses_out_of_the_loss_and_keeps_their_rewards(run):
    rollout, _, _ = run(dynamic_sampling=False, max_tokens=4)
    filtered = rollout.without_truncated()
    truncated = torch.tensor([rollout.held[i].finish_reason == "length" for i in range(48)])
    assert 0 < truncated.sum() < 48
    for i in range(48):
        assert filtered.held[i].response_mask.sum() == (0 if truncated[i] else rollout.response_tokens_S[i])
    assert torch.equal(filtered.response_tokens_S, rollout.response_tokens_S * ~truncated)
    assert torch.equal(filtered.reward_S, rollout.reward_S) and torch.equal(filtered.table, rollout.table)


def test_a_rollout_survives_the_disk(run, tmp_path):
    rollout, _, _ = run()
    write_rollout(str(tmp_path), 3, rollout, Replicas.current())
    again = read_rollout(str(tmp_path), 3, 6, 8, Replicas.current())
    for name in ("packed_length_S", "response_tokens_S", "reward_S", "group_ids_S", "table"):
        assert torch.equal(getattr(again, name), getattr(rollout, name)), name
    for name in ("kept", "visits", "batches", "carried"):
        assert getattr(again, name) == getattr(rollout, name), name
    assert again.leftovers is None and len(again.spare) == len(rollout.spare)
    for number, sample in rollout.held.items():
        for name, value in vars(sample).items():
            assert np.array_equal(getattr(again.held[number], name), value), name
    with pytest.raises(UserError, match="step_0000004"):
        read_rollout(str(tmp_path), 4, 6, 8, Replicas.current())
    with pytest.raises(UserError, match="6 prompts x 8 samples; set --grpo-prompts-per-step 6"):
        read_rollout(str(tmp_path), 3, 6, 4, Replicas.current())


def test_what_a_killed_writer_left_is_not_read(run, tmp_path):
    rollout, _, _ = run()
    left = tmp_path / "step_0000001.partial"
    left.mkdir()
    (left / "replica_00007.safetensors").write_bytes(b"half")
    write_rollout(str(tmp_path), 1, rollout, Replicas.current())
    assert len(read_rollout(str(tmp_path), 1, 6, 8, Replicas.current()).held) == 48
