"""The CUDA kernels' own source, run on the CPU by an emulator, against the CPU kernels; planted bugs are found."""

import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cuda_cases import CASES, differences, expected_results, make_inputs
from cuda_emulator import emulated

SEEDS = (1, 2, 3)
SANITIZERS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
BY_NAME = {case.name: case for case in CASES}

# fmt: off
# what is planted -> file of csrc/cuda, texts to replace, cases that must notice
PLANTED = {
    "wrong power of gamma across tiles": (
        "tile.cuh",
        {"power(static_cast<int64_t>(kTile) << k)": "power((static_cast<int64_t>(kTile) << k) - 1)"},
        ["long, half-life over several tiles"],
    ),
    "wrong power of gamma across warps": (
        "tile.cuh",
        {"g.warp = power(kWarpTokens)": "g.warp = power(kWarpTokens + 1)"},
        ["long, half-life over several tiles"],
    ),
    "carry across a sequence end between warps": (
        "tile.cuh",
        {"carry = warps.has_end[w] ? warps.total[w] : fmaf(gamma.warp, carry, warps.total[w]);": (
            "carry = fmaf(gamma.warp, carry, warps.total[w]);"
        )},
        ["single tokens between long ones", "long, half-life over several tiles", "random lengths"],
    ),
    "carry across a sequence end in a row": (
        "tile.cuh",
        {"const bool open = ((scan.end_lanes[row] >> lane) >> 1) == 0;": "const bool open = true;"},
        ["single tokens between long ones"],
    ),
    "carry across a sequence end in a tile to the right": (
        "look_ahead.cuh",
        {"wanted = closed_lanes ? closed_lanes ^ (closed_lanes - 1u) : kAllLanes;": "wanted = kAllLanes;"},
        ["single tokens between long ones", "long, half-life over several tiles", "random lengths"],
    ),
    "tile published before its total is known": (
        "look_ahead.cuh",
        {
            "store_relaxed(workspace.published + claim.tile, published_word(claim.epoch, has_end, total));": (
                "store_relaxed(workspace.published + claim.tile, published_word(claim.epoch, has_end, 0.0f)),\n"
                "store_relaxed(workspace.published + claim.tile, published_word(claim.epoch, has_end, total));"
            )
        },
        ["long, half-life over several tiles", "almost no discount"],
    ),
    "part of a sequence announced before it is written": (
        "sequence_sums.cuh",
        {
            "    uint64_t* part = part_of(tile);\n": "    uint64_t* part = part_of(tile);\n"
            "    arrived = atomicAdd(workspace.sequence_arrivals + first, 1u) + 1;\n",
            "    arrived = atomicAdd(workspace.sequence_arrivals + first, 1u) + 1;\n  }": "  }",
        },
        ["long, half-life over several tiles", "almost no discount", "more than 32 tiles ahead"],
    ),
    "statistics announced before they are written": (
        "statistics.cuh",
        {
            "    if (threadIdx.x < kNumStatistics)\n      store_relaxed": (
                "    if (threadIdx.x >= 64 && threadIdx.x - 64 < kNumStatistics)\n      __syncwarp(), store_relaxed"
            ),
            "+ threadIdx.x, __double_as_longlong(shared.block[threadIdx.x]));\n    __threadfence();\n"
            "    __syncthreads();": (
                "+ threadIdx.x - 64, __double_as_longlong(shared.block[threadIdx.x - 64]));"
            ),
        },
        ["long, half-life over several tiles", "almost no discount", "more than 32 tiles ahead"],
    ),
    "words of an earlier launch taken as this one's": (
        "look_ahead.cuh",
        {"static_cast<unsigned>(word >> 33) == epoch": "static_cast<unsigned>(word >> 33) != 0"},
        ["almost no discount", "long, half-life over several tiles", "no discount at all"],
    ),
    "epoch not advanced": (
        "look_ahead.cuh",
        {"epoch & 0x3fffffffu": "(epoch - 1) & 0x3fffffffu"},
        ["almost no discount", "long, half-life over several tiles", "no discount at all"],
    ),
    "arrivals not cleared for the next launch": (
        "sequence_sums.cuh",
        {"workspace.sequence_arrivals[first] = 0;": ""},
        ["long, half-life over several tiles", "almost no discount"],
    ),
    "end on the last token of a tile missed": (
        "discounted_scan.cu",
        {"if (last >= start + kTile) break;": "if (last >= start + kTile - 1) break;"},
        ["ends on every tile boundary"],
    ),
    "last tile of a sequence left out of its sums": (
        "sequence_sums.cuh",
        {"offset_of(sequences, sequence + 1) - 1) / kTile": "offset_of(sequences, sequence + 1) - 2) / kTile"},
        ["one token more than a tile"],
    ),
    "vector access of misaligned streams": (
        "fipo_loss.cu",
        {"aligned_to(in.logp, vector) &&": "true ||"},
        ["misaligned by 1"],
    ),
    "vector access of a misaligned scan": (
        "discounted_scan.cu",
        {"aligned = aligned_to(arguments.x, 16)": "aligned = true || aligned_to(arguments.x, 16)"},
        ["misaligned by 1"],
    ),
    "asynchronous copies not waited for": (
        "fipo_loss.cu",
        {"  async_wait();\n": ""},
        ["per token"],
    ),
    "barrier forgotten before the warps' totals are read": (
        "discounted_scan.cu",
        {"    shared.warps.has_end[warp] = scan.has_end;\n  }\n  __syncthreads();": (
            "    shared.warps.has_end[warp] = scan.has_end;\n  }"
        )},
        ["long, half-life over several tiles"],
    ),
}
# fmt: on


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The emulated kernels: as they are, under sanitizers, and one program for each planted bug; built side by side."""
    folder = tmp_path_factory.mktemp("programs")

    def planted(index: int):
        file, mutations, _ = list(PLANTED.values())[index]
        home = folder / f"planted{index}"
        return emulated.build(folder / f"run_planted{index}", emulated.mutated_sources(home, file, mutations))

    with ThreadPoolExecutor(2) as pool:
        builds = {
            "as it is": pool.submit(emulated.build, folder / "run"),
            "sanitized": pool.submit(emulated.build, folder / "run_sanitized", flags=SANITIZERS),
        }
        builds |= {name: pool.submit(planted, index) for index, name in enumerate(PLANTED)}
        yield lambda name: builds[name].result()


@pytest.fixture(scope="module")
def emulated_results(programs, tmp_path_factory):
    """seed -> one (inputs, results) for each case; all cases of a seed share a process and its workspace."""
    made = {}

    def get(seed: int):
        if seed not in made:
            batches = [make_inputs(case, seed) for case in CASES]
            results = emulated.run(programs("as it is"), tmp_path_factory.mktemp("seed"), batches, seed)
            made[seed] = dict(zip(BY_NAME, zip(batches, results, strict=True), strict=True))
        return made[seed]

    return get


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("seed", SEEDS)
def test_emulated_kernels_agree_with_the_cpu_kernels(emulated_results, seed, name):
    inputs, actual = emulated_results(seed)[name]
    assert differences(actual, expected_results(inputs), inputs.case) == []


def test_emulated_results_do_not_depend_on_the_order_of_execution(emulated_results, programs, tmp_path):
    names = ["single tokens between long ones", "no discount at all", "more than 32 tiles ahead", "random lengths"]
    batches = [emulated_results(SEEDS[0])[name][0] for name in names]
    for name, again in zip(names, emulated.run(programs("as it is"), tmp_path, batches, seed=77), strict=True):
        first = emulated_results(SEEDS[0])[name][1]
        for key in first:
            torch.testing.assert_close(again[key], first[key], rtol=0, atol=0, equal_nan=True)


def test_emulated_kernels_under_sanitizers(programs, tmp_path, monkeypatch):
    # leaks cannot be looked for in a traced process; fibers have stacks of their own
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0")
    batches = [make_inputs(case, seed=4) for case in CASES]
    for inputs, actual in zip(batches, emulated.run(programs("sanitized"), tmp_path, batches, seed=4), strict=True):
        assert differences(actual, expected_results(inputs), inputs.case) == [], inputs.case.name


def test_sanitizers_notice_an_emulated_read_past_the_end(tmp_path, monkeypatch):
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0")
    mutation = {"const bool whole = start + kTile <= in.num_tokens;": "const bool whole = true;"}
    program = emulated.build(tmp_path / "run", emulated.mutated_sources(tmp_path, "fipo_loss.cu", mutation), SANITIZERS)
    with pytest.raises(subprocess.CalledProcessError) as failure:
        emulated.run(program, tmp_path, [make_inputs(BY_NAME["one token more than a tile"], seed=1)], seed=1)
    assert b"AddressSanitizer" in failure.value.stderr


@pytest.mark.parametrize("name", PLANTED)
def test_emulator_catches_a_planted_bug(programs, tmp_path, name):
    """By a wrong result, a crash, or a hang."""
    program = programs(name)
    for seed in range(1, 6):
        batches = [make_inputs(BY_NAME[case], seed) for case in PLANTED[name][2]]
        try:
            results = emulated.run(program, tmp_path, batches, seed, timeout=20)
        except subprocess.SubprocessError:
            return
        for inputs, actual in zip(batches, results, strict=True):
            if differences(actual, expected_results(inputs), inputs.case):
                return
    pytest.fail("no case noticed")
