"""What a run leaves behind: lines on the console, metrics and samples on disk, summary and report at its end.

Only the first rank records (``writer`` is None on the others), but every rank takes part in the reductions.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_fipo.data.packing import PackedBatch
from megatron_fipo.data.planning import UpdatePlan
from megatron_fipo.evaluation.accuracy import Evaluation
from megatron_fipo.loss import LossConfig
from megatron_fipo.model.policy import Update
from megatron_fipo.observe import alarms
from megatron_fipo.observe.console import Console
from megatron_fipo.observe.efficiency import Efficiency, peak_memory
from megatron_fipo.observe.influence import best_and_worst, gather_weights, sample_record
from megatron_fipo.observe.overview import overview
from megatron_fipo.observe.run_data import headline, load_run
from megatron_fipo.observe.run_folder import RunFolder
from megatron_fipo.observe.step_metrics import loss_metrics, policy_metrics, rollout_metrics, staleness
from megatron_fipo.observe.timers import PhaseTimer
from megatron_fipo.observe.writers import MetricWriter
from megatron_fipo.parallel.reduce import reduce_statistics
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.report import write_report
from megatron_fipo.rollout.rollout import Rollout


class Recorder:
    """Collects a step's numbers and writes them."""

    def __init__(
        self,
        folder: RunFolder,
        writer: MetricWriter | None,
        console: Console,
        timer: PhaseTimer,
        replicas: Replicas,
        loss: LossConfig,
        efficiency: Efficiency,
        tokenizer: PreTrainedTokenizerBase,
    ):
        self._folder, self._writer, self._console = folder, writer, console
        self._timer, self._replicas, self._loss = timer, replicas, loss
        self._efficiency, self._tokenizer = efficiency, tokenizer

    def before(self, evaluation: Evaluation) -> None:
        """The evaluation before the first step; what was timed until now belongs to no step."""
        self._timer.take()
        if self._writer and evaluation.metrics:
            self._writer.write({"step": 0, "time": time.time(), **evaluation.metrics})
            self._writer.write_samples({"step": 0, "when": "before", **record} for record in evaluation.examples)
            self._show(evaluation)

    def step(
        self,
        step: int,
        rollout: Rollout,
        plan: Sequence[UpdatePlan],
        batches: Sequence[Sequence[PackedBatch]],
        entropy_sum: Tensor,
        extra: dict[str, float],
        updates: Sequence[Update],
        learning_rate: float,
        evaluation: Evaluation | None,
    ) -> None:
        """One finished step; collective over all ranks.

        ``batches`` are those of the ``plan``, ``updates`` went over them once or more; ``extra`` are metrics that other
        parts made of the step. Where an evaluation was due, two samples of the last update go to samples.jsonl as well.
        """
        statistics = reduce_statistics([update.statistics for update in updates], self._replicas)
        micro_batches = [batch for update in batches for batch in update]
        policy = policy_metrics(micro_batches, entropy_sum, self._loss.influence, self._replicas, rollout.stale_samples)
        policy |= staleness(rollout, step - 1, self._replicas)
        policy["perf/peak_memory_gb"] = peak_memory(self._replicas.device) / 1e9
        numbers = best_and_worst(rollout, plan[-1]) if evaluation and self._loss.influence else []
        samples = gather_weights(numbers, rollout, batches[-1], updates[-1].weights, self._replicas)
        if self._writer is None:
            return
        times = self._timer.take()
        metrics = {
            "step": step,
            "time": time.time(),
            **rollout_metrics(rollout),
            **policy,
            **extra,
            **loss_metrics(statistics, [update.grad_norm for update in updates], self._loss),
            "actor/lr": learning_rate,
            **self._efficiency.metrics(rollout, plan, len(updates) // len(plan), times),
            **times,
            **(evaluation.metrics if evaluation else {}),
        }
        earlier = self._writer.history[-1].get("alarms", {}) if self._writer.history else {}
        now = alarms.raised([*self._writer.history, metrics])
        self._writer.write(metrics | {"alarms": now})
        self._writer.write_samples(
            {"step": step, **sample_record(sample, rollout, self._tokenizer, "step")} for sample in samples
        )
        self._console.step(metrics)
        for kind, text in now.items():
            if kind not in earlier:
                self._console.note(f"  alarm: {text} (docs/metrics.md)")
        if evaluation:
            self._show(evaluation)

    def finish(self, step: int, seed: int, evaluation: Evaluation | None, status: str) -> None:
        """Summary, report, and the last words on the console."""
        if self._writer is None:
            return
        examples = evaluation.examples if evaluation else ()
        self._writer.write_samples({"step": step, "when": "after", **record} for record in examples)
        self._writer.close()
        if not self._folder.metrics.stat().st_size:
            return  # stopped before there was anything to tell
        run = load_run(self._folder.path)
        numbers = headline(run)
        accuracies = {
            key: numbers[key] and numbers[key]["value"]
            for key in ("accuracy_before", "accuracy_after", "greedy_before", "greedy_after")
        }
        summary = {
            **accuracies,
            "active_fraction_mean": numbers["active_fraction_mean"],
            "train_seconds": sum(run.values("time/step")) - sum(run.values("time/eval")),
            "steps": numbers["steps"],
            "seed": seed,
            "status": status,
            "alarms": alarms.onsets(run.rows),
            "versions": run.environment,
        }
        self._folder.write_summary(summary)
        report = write_report([replace(run, summary=summary)], self._folder.report)
        answers = [sample for sample in run.samples if sample["when"] in ("before", "after")]
        self._console.finish(summary, overview(run), answers, report)

    def _show(self, evaluation: Evaluation) -> None:
        for name in dict.fromkeys(key.split("/")[1] for key in evaluation.metrics):
            self._console.evaluation(name, evaluation.metrics)
