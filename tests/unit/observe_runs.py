"""A run folder made by the real writers from synthetic numbers, shaped like the quickstart's."""

import math
from pathlib import Path

from megatron_fipo.observe.run_folder import RunFolder
from megatron_fipo.observe.writers import MetricWriter

ACCURACY_BEFORE, ACCURACY_AFTER = 0.234375, 0.5576171875  # 240 and 571 of 1,024


def step_metrics(step: int, steps: int = 20, seed: int = 1) -> dict:
    done = 1 - math.exp(-5 * step / steps)
    wiggle = math.sin(12.9898 * step + 78.233 * seed)
    accuracy = 0.22 + 0.36 * done + 0.03 * wiggle
    length = 14 + 13.5 * done + wiggle
    updates = [
        {
            "actor/ppo_kl": 0.0009 * update,
            "actor/grad_norm": 0.4 + 0.1 * update,
            "fipo/active_fraction": 0.0 if update == 0 else 0.42 + 0.05 * update + 0.02 * wiggle,
        }
        for update in range(4)
    ]
    return {
        "step": step,
        "time": 1.8e9 + 7 * step,
        "reward/mean": 2 * accuracy - 1,
        "reward/accuracy": accuracy,
        "response/length_mean": length,
        "response/length_min": 3.0,
        "response/length_q25": length - 5,
        "response/length_median": length + 0.5,
        "response/length_q75": length + 6,
        "response/length_max": 48.0,
        "response/truncated_fraction": 0.02 * (1 - done),
        "rollout/kept_groups": 32.0,
        "rollout/dropped_groups": 8.0 + round(4 * done),
        "actor/entropy": 0.24 - 0.16 * done,
        "actor/ppo_kl": 0.0028 + 0.001 * wiggle,
        "actor/pg_clipfrac": 0.012 + 0.004 * wiggle,
        "actor/pg_clipfrac_lower": 0.0,
        "actor/grad_norm": 0.55 + 0.2 * wiggle * (1 - done),
        "actor/influence_weights_mean": 1.02 + 0.003 * wiggle,
        "actor/influence_weights_min": 1.0,
        "actor/influence_weights_max": 1.2,
        "actor/IW_overall_clip_ratio": 0.65,
        "actor/IW_upper_clip_ratio": 0.05,
        "actor/IW_lower_clip_ratio": 0.6,
        "actor/lr": 2e-4 * min(1.0, step / 5),
        "fipo/active_fraction": 0.39 + 0.02 * wiggle,
        "mismatch/kl": 1e-7,
        "mismatch/rms": 3e-4,
        "fipo/noise_budget": 0.0375,
        "perf/response_tokens_per_second": 4000 + 900 * done + 150 * wiggle,
        "perf/total_tokens_per_second": 6100 + 900 * done + 150 * wiggle,
        "perf/response_tokens_per_second_per_rank": 2000 + 450 * done + 75 * wiggle,
        "perf/train_tflops_per_rank": 0.01 + 0.001 * wiggle,
        "perf/peak_memory_gb": 1.2,
        "time/rollout": 0.9 + 0.5 * done,
        "time/old_logp": 0.3,
        "time/update": 1.4 + 0.1 * wiggle,
        "time/step": 2.9 + 0.6 * done + 0.1 * wiggle,
        "updates": updates,
    }


def evaluation_metrics(accuracy: float, greedy: float, length: float) -> dict:
    return {
        "eval/held-out/accuracy": accuracy,
        "eval/held-out/greedy_accuracy": greedy,
        "eval/held-out/length_mean": length,
        "eval/held-out/n": 1024,
    }


def weighted_samples(step: int) -> list[dict]:
    """A right and a wrong response with the influence weight of every token, and a tool's answer among them."""
    pieces = [" 7", "+1", "=", "8", "<b>", "tool:", " 8", "\n", "end"]
    influence = [1.2, 1.1, 1.0, 0.9, 0.8, None, None, 1.0, 1.0001]
    return [
        {
            "step": step,
            "when": "step",
            "prompt": "7+1=",
            "response": "".join(pieces),
            "correct": correct,
            "reward": 1.0 if correct else -1.0,
            "pieces": pieces,
            "influence": influence,
            "tokens_left_out": 0 if correct else 1234,
        }
        for correct in (True, False)
    ]


def make_run(
    runs_dir: Path, name: str = "quickstart", steps: int = 20, seed: int = 1, finished: bool = True
) -> RunFolder:
    folder = RunFolder(runs_dir, name)
    with MetricWriter(folder) as writer:
        writer.write({"step": 0, **evaluation_metrics(ACCURACY_BEFORE, 0.15, 14.2)})
        for step in range(1, steps + 1):
            metrics = step_metrics(step, steps, seed)
            if step % 5 == 0:
                share = min(1.0, 0.7 + 0.3 * step / steps)
                accuracy = ACCURACY_AFTER if step == steps else ACCURACY_AFTER * share - 0.01 * seed
                metrics |= evaluation_metrics(accuracy, 0.74 * share, 27.3)
                writer.write_samples(weighted_samples(step))
            writer.write(metrics)
        for when, step, answers in (
            ("before", 0, ("#4$", "#-3$")),
            ("after", steps, ("7+1=8;8-3=5;5-2=3#3$", "9-4=5;5<2=7#7$")),
        ):
            prompts = (("7+1-3-2=", "3"), ("9-4+2=", "7"))
            writer.write_samples(
                {
                    "step": step,
                    "when": when,
                    "prompt": prompt,
                    "response": response,
                    "answer": answer,
                    "correct": response.endswith(f"#{answer}$"),
                }
                for (prompt, answer), response in zip(prompts, answers, strict=True)
            )
    folder.write_arguments(
        {"preset": "quickstart", "seed": seed, "lr": 2e-4, "fipo_half_life": 32.0, "grpo_group_size": 8, "zero": None}
    )
    folder.write_environment()
    if finished:
        folder.write_summary(
            {
                "accuracy_before": ACCURACY_BEFORE,
                "accuracy_after": ACCURACY_AFTER,
                "active_fraction_mean": 0.39,
                "train_seconds": 132.4,
                "steps": steps,
                "seed": seed,
                "status": "finished",
            }
        )
    return folder
