"""Reading prompts, and the stream that hands them out."""

import json

import pytest

from megatron_fipo.data.layouts import Keys
from megatron_fipo.data.prompts import Prompt, PromptStream, count_duplicates, drop_long, read_prompts
from megatron_fipo.errors import UserError

GOOD = {"prompt": "1+1=", "answer": "2", "source": "reasoning_gym/chain_sum", "metadata": {"difficulty": 1}}


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


def write(path, *lines) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_rows_become_prompts_numbered_over_all_files(tmp_path):
    first = write(tmp_path / "a.jsonl", GOOD, "", GOOD | {"prompt": "2+2=", "answer": "4"})
    second = write(tmp_path / "b.jsonl", GOOD | {"prompt": "3="})
    prompts = read_prompts([first, second], encode)
    assert [(p.id, p.answer, len(p.tokens)) for p in prompts] == [(0, "2", 4), (1, "4", 4), (2, "2", 2)]
    assert prompts[0].metadata == {"difficulty": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({k: v for k, v in GOOD.items() if k != "answer"}, "'answer'"),
        (GOOD | {"answer": "  "}, "'answer'"),
        (GOOD | {"answer": []}, "'answer'"),
        (GOOD | {"prompt": None}, "'prompt'"),
        (GOOD | {"source": 5}, "source"),
        (GOOD | {"metadata": []}, "'metadata'"),
        ("[1]", "a JSON list"),
        ("{broken", "not JSON"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, reason):
    path = write(tmp_path / "data.jsonl", GOOD, row)
    with pytest.raises(UserError, match=f"data.jsonl, row 2: .*{reason}"):
        read_prompts([path], encode)


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(UserError, match="nothing.jsonl does not exist"):
        read_prompts([str(tmp_path / "nothing.jsonl")], encode)
    with pytest.raises(UserError, match="--answer-key 'gold' is in no row of"):
        read_prompts([write(tmp_path / "d.jsonl", GOOD)], encode, Keys(answer="gold"))
    with pytest.raises(UserError, match="no prompt in"):
        read_prompts([write(tmp_path / "empty.jsonl")], encode)


def test_long_prompts_are_dropped(tmp_path):
    prompts = read_prompts([write(tmp_path / "d.jsonl", GOOD, GOOD | {"prompt": "1+1+1="})], encode)
    assert [p.id for p in drop_long(prompts, 4)] == [0]
    with pytest.raises(UserError, match="--max-prompt-tokens 3 drops every prompt .the shortest has 4"):
        drop_long(prompts, 3)


def test_each_epoch_holds_every_prompt_once_in_an_order_of_its_own():
    prompts = list(range(7))
    stream = PromptStream(prompts, seed=1)
    visits = stream.take(5) + stream.take(16)
    assert [visit for visit, _ in visits] == list(range(21))
    epochs = [[p for _, p in visits[start : start + 7]] for start in (0, 7, 14)]
    assert all(sorted(epoch) == prompts for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [p for _, p in PromptStream(prompts, seed=2).take(7)] != epochs[0]


def test_a_fingerprint_tells_streams_apart(tmp_path):
    prompts = read_prompts([write(tmp_path / "d.jsonl", GOOD, GOOD | {"prompt": "1+1+1="})], encode)
    same, seed, fewer = PromptStream(prompts, 1, cursor=7), PromptStream(prompts, 2), PromptStream(prompts[:1], 1)
    assert same.fingerprint == PromptStream(prompts, 1).fingerprint
    assert len({same.fingerprint, seed.fingerprint, fewer.fingerprint}) == 3


def test_a_stream_continues_at_its_cursor():
    whole, half = PromptStream(list(range(5)), seed=3), PromptStream(list(range(5)), seed=3)
    expected = whole.take(12)
    half.take(4)
    assert PromptStream(list(range(5)), 3, half.cursor).take(8) == expected[4:]


def test_duplicates_are_counted(tmp_path):
    prompts = read_prompts([write(tmp_path / "d.jsonl", GOOD, GOOD, GOOD | {"prompt": "2="}, GOOD)], encode)
    assert count_duplicates(prompts) == 2


def test_equal_rows_are_held_once_and_handed_out_as_often_as_they_stand_there(tmp_path):
    rows = [GOOD | {"prompt": f"{i}="} for i in range(3)] * 4
    path = write(tmp_path / "d.jsonl", *rows)
    prompts = read_prompts([path], encode)
    assert [p.id for p in prompts] == [0, 1, 2] * 4 and len(set(map(id, prompts))) == 3
    apart = [Prompt(i, p.tokens, p.answer, p.source, p.metadata, p.part) for i, p in enumerate(prompts)]
    streams = [PromptStream(p, seed=5) for p in (prompts, apart)]
    assert streams[0].fingerprint == streams[1].fingerprint
    one, other = ([(visit, p.tokens) for visit, p in stream.take(30)] for stream in streams)
    assert one == other and sorted(one)[-1][0] == 29


def test_rows_that_differ_in_anything_are_apart(tmp_path):
    changes = [{}, {"answer": "3"}, {"source": "gsm8k"}, {"metadata": {"n": 1}}, {"metadata": {"n": True}}]
    path = write(tmp_path / "d.jsonl", *[GOOD | change for change in changes])
    prompts = read_prompts([path, path], encode)
    assert [p.id for p in prompts] == list(range(10)) and [p.part for p in prompts] == [0] * 5 + [1] * 5
    assert prompts[4].metadata["n"] is True and count_duplicates(prompts) == 9


def test_fingerprints_are_those_of_older_checkpoints():
    assert PromptStream(PARTS, seed=3).fingerprint == "ad81c87e5c676ff5"
    assert PromptStream(PARTS, seed=3, weights=[1.0, 1.0, 2.0]).fingerprint == "534d2aa979e2206c"


def test_the_source_is_resolved_and_a_row_without_one_has_its_files_name(tmp_path):
    path = write(tmp_path / "aime24.jsonl", {"problem": "p", "answer": "1"}, GOOD)
    seen = []
    prompts = read_prompts([path], encode, resolve=lambda source, where: seen.append((source, where)) or "rule")
    assert seen == [("aime24.jsonl", f"{path}, row 1"), (GOOD["source"], f"{path}, row 2")]
    assert {p.source for p in prompts} == {"rule"}


PARTS = [Prompt(i, (i,), "1", "s", part=0 if i < 5 else 1 if i < 12 else 2) for i in range(40)]


def test_weights_share_out_every_epoch_and_each_part_goes_round_evenly():
    stream = PromptStream(PARTS, seed=3, weights=[5.0, 3.0, 0.0])
    drawn = [prompt for _, prompt in stream.take(40 * 7)]
    for epoch in range(7):
        parts = [p.part for p in drawn[40 * epoch : 40 * (epoch + 1)]]
        assert [parts.count(part) for part in range(3)] == [25, 15, 0]
    for part, size in ((0, 5), (1, 7)):
        counts = [sum(p is prompt for p in drawn) for prompt in PARTS if prompt.part == part]
        assert len(counts) == size and max(counts) - min(counts) <= 1
    assert sum(a.part != b.part for a, b in zip(drawn, drawn[1:], strict=False)) > 80, "parts are mixed"


def test_a_weighted_stream_continues_at_its_cursor_and_has_a_fingerprint_of_its_own():
    whole = PromptStream(PARTS, seed=3, weights=[1.0, 1.0, 2.0]).take(200)
    again = PromptStream(PARTS, seed=3, weights=[1.0, 1.0, 2.0], cursor=77)
    assert again.take(123) == whole[77:]
    fingerprints = {PromptStream(PARTS, 3, weights=w).fingerprint for w in ((), (1, 1, 2), (1, 1, 1))}
    assert len(fingerprints) == 3


def test_shares_of_the_stream_do_not_depend_on_how_many_replicas_take_them():
    """Every replica takes the whole batch and keeps its share, so only the sizes of batches could matter."""
    one, two = (PromptStream(PARTS, seed=9, weights=[1.0, 2.0, 3.0]) for _ in range(2))
    batches = [one.take(12) for _ in range(10)]
    assert [v for b in batches for v in b] == [v for b in (two.take(60), two.take(60)) for v in b]
