#!/usr/bin/env python
"""The training step of an architecture with random weights: tokens/s, model FLOP/s, memory, phases.

    python tools/benchmark_step.py [--json FILE]
    torchrun --nproc-per-node 8 tools/benchmark_step.py --architecture qwen2.5-7b --samples 512 --lengths dapo \
        --tensor-model-parallel-size 4 --sequence-parallel ...

Flags that are not this tool's are those of training. A step is what training does after a rollout: plan, pack, old
log-probs, one update over all samples. On one process it also trains TRL's GRPOTrainer on the same weights and
samples with as many threads, in an environment of its own that is made at the first use. Key: update_over_trl, the
update phase's response tokens/s, ours / TRL's at its best micro-batch size.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from benchmarks.architectures import ARCHITECTURES
from benchmarks.measure import write_report
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from megatron_fipo import compat

HERE = Path(__file__).parent
GROUP = 8  # samples of a prompt
TRL_MICRO_BATCHES = (4, 8, 16)


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="qwen3-3.4m")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--lengths", default="128:1:1024", help="log-normal MEAN:SIGMA:CUT of the responses, or 'dapo'")
    parser.add_argument("--max-tokens-per-microbatch", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of a CPU process")
    parser.add_argument("--no-peer", action="store_true", help="leave TRL out")
    parser.add_argument("--json", type=Path, help="also write the results here")
    return parser.parse_known_args()


def response_lengths(spec: str, samples: int) -> np.ndarray:
    """int64 [samples]."""
    if spec == "dapo":
        shipped = json.loads((HERE / "data" / "dapo_like_lengths.json").read_text())["lengths"]
        return np.array(shipped[:samples])
    mean, sigma, cut = (float(x) for x in spec.split(":"))
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - sigma**2 / 2, sigma, samples)
    return drawn.round().astype(np.int64).clip(1, int(cut))


def make_samples(lengths: np.ndarray, vocab_size: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(1)

    def tokens(n: int) -> list[int]:
        return random.integers(3, vocab_size, n).tolist()

    prompts = [tokens(int(n)) for n in random.integers(8, 24, len(lengths) // GROUP)]
    return [
        {"prompt": prompts[i // GROUP], "response": tokens(int(n)), "advantage": float(random.normal())}
        for i, n in enumerate(lengths)
    ]


def open_policy(
    options: argparse.Namespace, model: Path, samples: list[dict[str, Any]], flags: list[str], with_weights: bool
) -> tuple[argparse.Namespace, Any]:
    """Arguments and policy of a run that would train on these samples, weights random or the folder's."""
    from megatron_fipo.arguments import parse_arguments
    from megatron_fipo.checkpoint.hf import load_hf_weights
    from megatron_fipo.model.policy import Policy
    from megatron_fipo.parallel.replicas import Replicas
    from megatron_fipo.session import start_megatron

    argv = [
        *("--preset", "fipo-32b", "--hf-model", model, "--train-from-rollouts", model, "--runs-dir", model / "runs"),
        *("--num-steps", 1, "--lr-warmup-iters", 0, "--allow-inactive-fipo", "--reward-overlong-buffer", 0),
        *("--grpo-prompts-per-step", len(samples) // GROUP, "--grpo-group-size", GROUP),
        *("--global-batch-size", len(samples), "--max-tokens-per-microbatch", options.max_tokens_per_microbatch),
        *("--max-prompt-tokens", 32, "--rollout-max-tokens", max(len(s["response"]) for s in samples)),
        *flags,
    ]
    args = parse_arguments([*map(str, argv)])
    chunks, optimizer, scheduler = start_megatron(args)
    if with_weights:
        load_hf_weights(chunks, model)
        optimizer.reload_model_params()
    context = Replicas.current().context
    return args, Policy(chunks, optimizer, scheduler, args.vocab_size, 1.0, args.seq_length, context)


def make_rollout(samples: list[dict[str, Any]]) -> Any:
    """This replica's share of the samples, and every sample's numbers."""
    from megatron_fipo.data.samples import Sample
    from megatron_fipo.parallel.replicas import Replicas
    from megatron_fipo.rollout.rollout import GeneratedSamples, Rollout

    def sample(i: int) -> Sample:
        prompt, response = samples[i]["prompt"], samples[i]["response"]
        length = len(prompt) + len(response)
        return Sample(
            prompt_id=i // GROUP, group_id=i // GROUP, tokens=np.array(prompt + response, np.int32),
            response_mask=np.arange(length) >= len(prompt), rollout_logp=np.zeros(length, np.float32),
            finish_reason="stop", weight_versions=((0, 0, len(response)),), reward=samples[i]["advantage"],
            correct=True,
        )  # fmt: skip

    rows = [GeneratedSamples.row(sample(i), False) for i in range(len(samples))]
    table = torch.tensor(rows, dtype=torch.float64).unflatten(0, (-1, GROUP))
    replicas = Replicas.current()
    groups = {g: [sample(g * GROUP + i) for i in range(GROUP)] for g in range(replicas.rank, len(table), replicas.size)}
    return Rollout.of(table, range(len(table)), range(len(table)), groups, 1)


def measure_ours(args: argparse.Namespace, policy: Any, samples: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """Median seconds of each phase of a step, the slowest rank's."""
    from megatron_fipo.data.batches import make_micro_batches
    from megatron_fipo.parallel.replicas import Replicas
    from megatron_fipo.settings import loss_config, planner

    replicas, loss, rollout = Replicas.current(), loss_config(args), make_rollout(samples)
    advantage_S = torch.tensor([s["advantage"] for s in samples], device=replicas.device)
    plan_of = planner(args)
    seconds: dict[str, list[float]] = {"plan": [], "old_logp": [], "update": []}

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        synchronize()
        start = time.perf_counter()
        yield
        synchronize()
        seconds[name].append(time.perf_counter() - start)

    for _ in range(steps + 1):  # the first warms up
        with phase("plan"):
            plan = plan_of(rollout.packed_length_S.tolist())
            updates = make_micro_batches(plan, rollout, loss, replicas)
        with phase("old_logp"):
            updates, _ = policy.add_old_log_probs(updates)
        updates = [
            [replace(batch, advantage_S=batch.of_samples(advantage_S)) for batch in update] for update in updates
        ]
        with phase("update"):
            for micro_batches in updates:
                policy.update(micro_batches, loss)
    medians = torch.tensor([statistics.median(times[1:]) for times in seconds.values()], device=replicas.device)
    dist.all_reduce(medians, dist.ReduceOp.MAX)
    return dict(zip(seconds, medians.tolist(), strict=True))


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this rank's device: what model FLOP/s are measured against."""
    on_gpu = torch.cuda.is_available()
    size = 8192 if on_gpu else 1024
    a, b = (torch.randn(size, size, dtype=dtype, device="cuda" if on_gpu else "cpu") for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def measure_trl(model: Path, samples: list[dict[str, Any]], steps: int, threads: int) -> tuple[float, int]:
    """Seconds of one of TRL's updates at its best micro-batch size, and that size."""
    python = trl_environment()
    # TRL is a job of one process itself, and the port of this one's process group is taken.
    launcher = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}

    def seconds(micro_batch: int, steps: int) -> float:
        job = model / "trl.json"
        settings = {"micro_batch": micro_batch, "steps": steps + 1, "threads": threads}  # the first step warms up
        job.write_text(json.dumps({"model": str(model), "samples": samples, **settings}))
        command = [str(python), str(HERE / "benchmarks" / "trl_peer.py"), str(job)]
        output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        return statistics.median(json.loads(output.splitlines()[-1])[1:])

    best = min(TRL_MICRO_BATCHES, key=lambda size: seconds(size, 1))
    return seconds(best, steps), best


def trl_environment() -> Path:
    """The Python of an environment with TRL, laid over this one's packages."""
    requirements = HERE / "benchmarks" / "trl_requirements.txt"
    folder = HERE.parent / ".cache" / "trl"
    python, installed = folder / "bin" / "python", folder / "requirements.txt"
    if not installed.exists() or installed.read_text() != requirements.read_text():
        print("making TRL's environment ...", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "below.pth").write_text(f"{Path(np.__file__).parents[1]}\n")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(requirements)]
        subprocess.run(pip, check=True)
        installed.write_text(requirements.read_text())
    return python


def write_model(folder: Path, architecture: str, with_weights: bool) -> None:
    config = ARCHITECTURES[architecture]
    (folder / "config.json").write_text(json.dumps(config))
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(config["vocab_size"])}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(folder)
    if with_weights:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    else:
        save_file({"none": torch.zeros(1)}, folder / "model.safetensors")  # Megatron's own random ones are used


def quietly[T](call: Callable[..., T], *args: Any) -> T:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return call(*args)


def main() -> None:
    options, flags = parse()
    compat.install()
    from megatron_fipo.observe.environment import describe_environment
    from megatron_fipo.session import as_one_rank
    from megatron_fipo.settings import cost_model

    as_one_rank()
    torch.set_num_threads(options.threads)
    world = int(os.environ["WORLD_SIZE"])
    peer = world == 1 and not options.no_peer
    samples = make_samples(
        response_lengths(options.lengths, options.samples), ARCHITECTURES[options.architecture]["vocab_size"]
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        quietly(write_model, folder, options.architecture, peer)
        args, policy = quietly(open_policy, options, folder, samples, flags, peer)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        phases = measure_ours(args, policy, samples, options.steps)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated()
        rate = matmul_rate(args.params_dtype)
        trl = measure_trl(folder, samples, options.steps, options.threads) if peer else None
        again = measure_ours(args, policy, samples, options.steps) if peer else phases

    if dist.get_rank() == 0:
        response = sum(len(s["response"]) for s in samples)
        lengths = [len(s["prompt"]) + len(s["response"]) - 1 for s in samples]
        cost = cost_model(args)
        update = statistics.mean((phases["update"], again["update"]))  # TRL ran in between
        flops = 3 * sum(map(cost.sequence, lengths))
        row = {
            "architecture": options.architecture,
            "ranks": world,
            "samples": len(samples),
            "response_tokens": response,
            "tokens": sum(lengths),
            **{f"{name}_seconds": seconds for name, seconds in phases.items()},
            "update_response_tokens_per_second": response / update,
            "update_tokens_per_second": sum(lengths) / update,
            "model_teraflops_per_second_and_rank": flops / update / world / 1e12,
            "share_of_matmul_rate": flops / update / world / rate,
            "peak_memory_gib": memory / 2**30,
        }
        ratios = {}
        if trl:
            seconds, micro_batch = trl
            row |= {"trl_update_seconds": seconds, "trl_micro_batch": micro_batch}
            ratios["update_over_trl"] = seconds / update
        for name, value in row.items():
            print(f"  {name:40}{value:>16,.4g}" if isinstance(value, float) else f"  {name:40}{value!s:>16}")
        write_report(options.json, ratios, [row], describe_environment())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
