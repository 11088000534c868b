"""Reading prompts, and the stream that hands them out."""

import json

import pytest

from megatron_fipo.data.prompts import PromptStream, drop_long, read_prompts
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
        (GOOD | {"answer": 3}, "'answer'"),
        (GOOD | {"prompt": None}, "'prompt'"),
        (GOOD | {"source": ""}, "'source'"),
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
