"""TRL's GRPOTrainer on given samples: seconds of each optimizer step. Runs in TRL's own environment.

    python trl_peer.py JOB.json

The job names the model folder, the samples (prompt, response and advantage of each), how many samples go into a
micro-batch, the steps, and the threads. Generation is left out: every step trains on the given samples.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class GivenSamples(GRPOTrainer):
    """The trainer with its rollout replaced by samples that are already there."""

    samples: dict[str, torch.Tensor]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        return dict(self.samples)


class Clock(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def padded(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side=side)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True, padding_side=side)
    return ids, mask


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    samples, batch = job["samples"], job["micro_batch"]
    prompt_ids, prompt_mask = padded([s["prompt"] for s in samples], "left")
    completion_ids, completion_mask = padded([s["response"] for s in samples], "right")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(job["model"])
    tokenizer.pad_token = tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        config = GRPOConfig(
            folder, use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_strategy="no",
            disable_tqdm=True, per_device_train_batch_size=batch, gradient_accumulation_steps=len(samples) // batch,
            num_generations=8, max_steps=job["steps"], beta=0.0, epsilon=0.2, epsilon_high=0.28, loss_type="dapo",
            learning_rate=1e-6, gradient_checkpointing=False, dataloader_num_workers=0,
        )  # fmt: skip
        trainer = GivenSamples(
            AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["w1"] * 1024}),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.samples = {
            "prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": completion_ids,
            "completion_mask": completion_mask, "advantages": torch.tensor([s["advantage"] for s in samples]),
            "num_items_in_batch": completion_mask.sum(),
        }  # fmt: skip
        trainer.train()
    print(json.dumps(clock.seconds))


if __name__ == "__main__":
    main()
