"""No token of stale or partial weights enters a batch, whatever happens to the servers and in whatever order."""

from types import SimpleNamespace

import pytest
from fleets import V
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_fipo.rollout.engine import SamplingParams  # noqa: E402
from megatron_fipo.rollout.sglang.answer import Answer, Question  # noqa: E402
from megatron_fipo.rollout.sglang.fleet import Fleet  # noqa: E402
from megatron_fipo.rollout.sglang.server import MalformedAnswer, Server, ServerAddress  # noqa: E402

SERVERS = 3
QUESTION = Question("rid", (3, 4), 0, SamplingParams(2))


def event(label: str) -> dict:
    """The only event of an answer by a server that calls its weights ``label``."""
    meta = {"id": "rid", "prompt_tokens": 2, "completion_tokens": 2, "finish_reason": {"type": "length"}}
    meta |= {"output_token_logprobs": [[-1.0, 5, None], [-2.0, 6, None]]}
    meta |= {"weight_versions": [{"version": label, "start": 0, "end": 2}]}
    return {"output_ids": [5, 6], "meta_info": meta}


class World:
    """Servers as they are (``weights``: the version they hold, None if mixed or foreign; ``label``: what they say), and
    the fleet as the trainer sees it. Answers may arrive late."""

    def __init__(self) -> None:
        self.fleet = Fleet([Server(f"server {i}", ServerAddress("http://nowhere", "", "")) for i in range(SERVERS)])
        self.states = [SimpleNamespace(weights=None, label="default") for _ in range(SERVERS)]
        self.open: list[tuple[Server, int | None, int | None, str]] = []
        self.version = -1
        self.accepted = 0

    def begin(self, _: int) -> None:
        self.version += 1
        self.fleet.begin_update(self.version)

    def update(self, i: int) -> None:
        """A complete, checked update; only healthy servers get one."""
        if self.version >= 0 and self.fleet.servers[i] in self.fleet.healthy():
            self.states[i].weights, self.states[i].label = self.version, str(self.version)
            self.fleet.admit(self.fleet.servers[i])

    def update_in_part(self, i: int) -> None:
        """Some tensors are new; the server may have its new label already."""
        if self.version >= 0 and self.fleet.servers[i] in self.fleet.healthy():
            if self.fleet.servers[i] in self.fleet.serving():
                return  # an update is complete or not, once per version
            self.states[i].weights, self.states[i].label = None, str(self.version)
            self.fleet.condemn(self.fleet.servers[i], "died at a bucket")

    def restart(self, i: int) -> None:
        """Unseen by the trainer: the same address, the weights of the disk."""
        self.states[i].weights, self.states[i].label = None, "default"

    def condemn(self, i: int) -> None:
        self.fleet.condemn(self.fleet.servers[i], "silent")

    def pardon(self, i: int) -> None:
        self.fleet.pardon(self.fleet.servers[i])

    def ask(self, i: int) -> None:
        server, state = self.fleet.servers[i], self.states[i]
        if server in self.fleet.serving():
            self.open.append((server, self.fleet.version, state.weights, state.label))

    def answer(self, i: int) -> None:
        """The oldest answer arrives; the client's own checks decide."""
        if not self.open:
            return
        server, asked_under, weights, label = self.open.pop(0)
        answer = Answer(QUESTION, V, str(asked_under))
        assert answer.add(event(label))
        try:
            answer.completion()
        except MalformedAnswer:
            assert label == "default"
            return
        if self.fleet.serves(server, asked_under):
            assert weights == self.fleet.version, "a token of stale or partial weights"
            self.accepted += 1


EVENTS = ("begin", "update", "update_in_part", "restart", "condemn", "pardon", "ask", "answer")


def run(events: list[tuple[str, int]]) -> World:
    world = World()
    for name, i in events:
        getattr(world, name)(i)
        assert not set(world.fleet.serving()) & set(world.fleet.condemned)
    return world


SEQUENCES = st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, SERVERS - 1)), min_size=10, max_size=60)


@settings(max_examples=500, deadline=None)
@given(SEQUENCES)
def test_only_whole_present_weights_answer(events):
    run(events)


@pytest.mark.long
@settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SEQUENCES)
def test_only_whole_present_weights_answer_in_ten_thousand_sequences(events):
    run(events)


def test_answers_of_present_weights_are_accepted():
    """The property above is not empty."""
    steps = [("begin", 0), ("update", 0), ("ask", 0), ("answer", 0), ("condemn", 0), ("ask", 0), ("begin", 0)]
    steps += [("pardon", 0), ("update", 0), ("ask", 0), ("answer", 0)]
    assert run(steps).accepted == 2


def test_a_condemned_server_is_admitted_only_after_a_pardon_and_another_update():
    world = run([("begin", 0), ("update", 1), ("condemn", 1), ("pardon", 1)])
    server = world.fleet.servers[1]
    assert server in world.fleet.healthy() and server not in world.fleet.serving()
    world.condemn(1)
    with pytest.raises(ValueError, match="silent"):
        world.fleet.admit(server)
