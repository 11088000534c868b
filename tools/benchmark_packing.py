"""How level the packing is: a simulated training step of Qwen2.5-32B on 16 replicas with 4 pipeline stages each.

    python tools/benchmark_packing.py [--json FILE]

The step's 8,192 sequences (tools/data/dapo_like_lengths.json) are cut into the updates of the preset fipo-32b. Each
replica runs its micro-batches through the 1F1B schedule, simulated pass by pass; an update ends with its slowest
replica. A pack costs what its sequences with their padding cost; a dummy pack, what one of the alignment's length does.
`imbalance` is this step over an even one: the cost of all sequences without padding, spread over the replicas in as
many equal micro-batches, so with the same pipeline bubble. Takes three seconds; only `milliseconds` depends on the
machine.
"""

import argparse
import functools
import heapq
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_fipo.data.planning import MicroBatch, plan_step
from megatron_fipo.model.cost import CostModel
from megatron_fipo.observe.environment import describe_environment

LENGTHS = Path(__file__).parent / "data" / "dapo_like_lengths.json"
QWEN_32B = CostModel(
    layers=64, hidden_size=5120, ffn_hidden_size=27648, heads=40, kv_heads=8, head_dim=128, vocab_size=152064
)
BACKWARD = 2 / 3  # of a micro-batch's time

Update = Sequence[Sequence[MicroBatch]]
"""[replica][micro-batch], as UpdatePlan.micro_batches."""


@dataclass(frozen=True)
class Setting:
    """The simulated step; lengths and budgets in tokens."""

    cost: CostModel = QWEN_32B
    samples_per_update: int = 1024
    replicas: int = 16
    stages: int = 4
    max_tokens: int = 32768
    alignment: int = 32  # 2 x context parallelism 2 x tensor parallelism 8


def aligned(length: int, setting: Setting) -> int:
    """``length`` with its padding."""
    return -(-length // setting.alignment) * setting.alignment


def pipeline_time(costs: Sequence[float], stages: int) -> float:
    """When the last backward pass of a replica ends under the 1F1B schedule (Narayanan et al. 2021).

    ``costs`` are the forward and backward costs of its micro-batches over all stages, in the order of their start; the
    stages share the layers evenly, and messages take no time.
    """
    schedule = []  # of each stage: (is_backward, micro-batch)
    for stage in range(stages):
        warmup = min(stages - 1 - stage, len(costs))
        steady = [(back, k + (0 if back else warmup)) for k in range(len(costs) - warmup) for back in (False, True)]
        cooldown = [(True, k) for k in range(len(costs) - warmup, len(costs))]
        schedule.append([(False, k) for k in range(warmup)] + steady + cooldown)
    ends: dict[tuple[int, bool, int], float] = {}
    clock, done = [0.0] * stages, [0] * stages
    while sum(done) < 2 * stages * len(costs):
        for stage in range(stages):
            while done[stage] < len(schedule[stage]):
                back, k = schedule[stage][done[stage]]
                last = stage == stages - 1
                needs = (stage + (0 if last else 1), not last, k) if back else (stage - 1, False, k)
                if (back or stage > 0) and needs not in ends:
                    break
                start = max(clock[stage], ends.get(needs, 0.0))
                clock[stage] = start + costs[k] / stages * (BACKWARD if back else 1 - BACKWARD)
                ends[stage, back, k] = clock[stage]
                done[stage] += 1
    return max(clock)


def simulate(plan: Sequence[Update], lengths: Sequence[int], setting: Setting) -> dict[str, float]:
    """Step time (in forward FLOPs of one stage), its ratio to the even step, and how many packs there are."""
    step = even = 0.0
    for number, update in enumerate(plan):
        first = number * setting.samples_per_update
        members = range(first, min(first + setting.samples_per_update, len(lengths)))
        if sorted(i for packs in update for pack in packs for i in pack) != [*members]:
            raise ValueError(f"update {number} does not hold each of its samples exactly once")
        count = len(update[0])
        step += max(
            pipeline_time(
                [
                    sum(setting.cost.sequence(aligned(lengths[i], setting)) for i in pack)
                    or setting.cost.sequence(setting.alignment)
                    for pack in packs
                ],
                setting.stages,
            )
            for packs in update
        )
        total = sum(setting.cost.sequence(lengths[i]) for i in members)
        even += total / setting.replicas / count / setting.stages * (count + setting.stages - 1)
    return {
        "imbalance": step / even,
        "step_time": step,
        "micro_batches_per_replica": sum(len(update[0]) for update in plan),
        "dummy_micro_batches": sum(not pack for update in plan for packs in update for pack in packs),
    }


def level_packs(lengths: Sequence[int], setting: Setting) -> list[Update]:
    """This project's plan."""
    plan = plan_step(
        lengths,
        setting.samples_per_update,
        setting.replicas,
        setting.max_tokens,
        cost=setting.cost,
        pipeline_stages=setting.stages,
        alignment=setting.alignment,
    )
    return [update.micro_batches for update in plan]


def plain_order(lengths: Sequence[int], setting: Setting) -> list[Update]:
    """Each replica takes a slice of the samples and packs them as they come; dummies fill up to the same number."""

    def update(start: int) -> Update:
        share = setting.samples_per_update // setting.replicas
        replicas: list[list[MicroBatch]] = []
        for replica in range(setting.replicas):
            packs: list[list[int]] = []
            tokens = math.inf
            for i in range(start + replica * share, start + (replica + 1) * share):
                length = aligned(lengths[i], setting)
                if tokens + length > setting.max_tokens:
                    packs.append([])
                    tokens = 0
                packs[-1].append(i)
                tokens += length
            replicas.append([tuple(pack) for pack in packs])
        most = max(len(packs) for packs in replicas)
        return [packs + [()] * (most - len(packs)) for packs in replicas]

    return [update(start) for start in range(0, len(lengths), setting.samples_per_update)]


def longest_first_by_tokens(lengths: Sequence[int], setting: Setting) -> list[Update]:
    """Longest first to the pack with the fewest tokens, in Python, in the fewest packs that keep the budget."""
    tokens_of = [aligned(n, setting) for n in lengths]

    def update(start: int) -> Update:
        order = sorted(range(start, start + setting.samples_per_update), key=lambda i: (-tokens_of[i], i))
        count = math.ceil(sum(tokens_of[i] for i in order) / (setting.replicas * setting.max_tokens))
        while True:
            packs: list[list[int]] = [[] for _ in range(count * setting.replicas)]
            lightest = [(0, k) for k in range(len(packs))]
            for i in order:
                tokens, k = heapq.heappop(lightest)
                packs[k].append(i)
                heapq.heappush(lightest, (tokens + tokens_of[i], k))
            if all(len(packs[k]) <= 1 or tokens <= setting.max_tokens for tokens, k in lightest):
                break
            count += 1
        by_weight = sorted(packs, key=lambda pack: -sum(tokens_of[i] for i in pack))
        dealt: list[list[MicroBatch]] = [[] for _ in range(setting.replicas)]
        for first in range(0, len(packs), setting.replicas):
            load = [sum(tokens_of[i] for pack in packs for i in pack) for packs in dealt]
            by_load = sorted(range(setting.replicas), key=lambda r: load[r])
            for replica, pack in zip(by_load, by_weight[first : first + setting.replicas], strict=True):
                dealt[replica].append(tuple(pack))
        return dealt

    return [update(start) for start in range(0, len(lengths), setting.samples_per_update)]


def milliseconds(call: Callable[[], object], repeats: int = 15) -> float:
    """Shortest time of a call, as others may use the machine."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write ratios, rows and environment")
    args = parser.parse_args()
    lengths = json.loads(LENGTHS.read_text())["lengths"]
    methods = {"this plan": level_packs, "longest first by tokens": longest_first_by_tokens, "plain order": plain_order}
    settings = {
        "fipo-32b: 8 updates of 1,024": Setting(),
        "dapo: 16 updates of 512": Setting(samples_per_update=512),
        "one update of 8,192": Setting(samples_per_update=8192),
    }
    rows = []
    for name, setting in settings.items():
        print(
            f"{name}, {setting.replicas} replicas, {setting.stages} stages, packs of {setting.max_tokens:,} tokens, "
            f"alignment {setting.alignment}"
        )
        simulated = {method: simulate(plan(lengths, setting), lengths, setting) for method, plan in methods.items()}
        for method, plan in methods.items():
            row = {
                "setting": name,
                "method": method,
                **simulated[method],
                "step_over_ours": simulated[method]["step_time"] / simulated["this plan"]["step_time"],
                "milliseconds": milliseconds(functools.partial(plan, lengths, setting)),
            }
            rows.append(row)
            print(
                f"  {method:24} imbalance {row['imbalance']:.4f}   step / ours {row['step_over_ours']:.3f}   "
                f"micro-batches {row['micro_batches_per_replica']:4d}   dummies {row['dummy_micro_batches']:4d}   "
                f"{row['milliseconds']:6.2f} ms"
            )
    ratios = {"imbalance": rows[0]["imbalance"]}
    print(f"imbalance {ratios['imbalance']:.4f} (wanted: at most 1.03)")
    if args.json:
        result = {"ratios": ratios, "rows": rows, "environment": describe_environment()}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
