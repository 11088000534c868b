"""Megatron's flags that would do nothing here, or change what a ratio means, and what to use instead."""

from collections.abc import Sequence

from megatron_fipo.errors import UserError

_REFUSED = {
    "--perform-rl-step": "megatron_fipo runs its own loop; leave it out",
    "--grpo-filter-groups-with-same-reward": "use --rollout-dynamic-sampling",
    "--train-iters": "use --num-steps (one step is one rollout with all its updates)",
    "--train-samples": "use --num-steps (one step is one rollout with all its updates)",
    "--micro-batch-size": "micro-batches are packs; use --max-tokens-per-microbatch",
    "--seq-length": "it follows from --max-prompt-tokens and --rollout-max-tokens",
    "--save": "checkpoints go to RUNS_DIR/RUN_NAME/checkpoints; use --runs-dir and --run-name",
    "--save-retain-interval": "use --keep-last",
    "--async-strategy": "--async-save forks one writer per rank; leave it out",
    "--use-persistent-ckpt-worker": "--async-save forks one writer per rank; leave it out",
    "--ckpt-format": "checkpoints are torch_dist; leave it out",
    "--verify-integrity": "checkpoints are always verified; leave it out",
    "--ckpt-step": "--load takes the newest whole checkpoint; remove newer ones to go further back",
    "--pretrained-checkpoint": "use --load DIR --finetune",
    "--tokenizer-type": "the tokenizer comes from --hf-model",
    "--tokenizer-model": "the tokenizer comes from --hf-model",
    "--rollout-top-p": "training samples are drawn from the whole distribution; see --eval-top-p",
    "--rollout-top-k": "training samples are drawn from the whole distribution",
    "--fp16": "use --bf16, which needs no loss scaling",
    "--hidden-dropout": "old and new log-probs must come from the same network; leave it out",
    "--attention-dropout": "old and new log-probs must come from the same network; leave it out",
    "--window-size": "attention is causal over the whole sequence; leave it out",
    "--moe-aux-loss-coeff": "the policy's gradient is the only one; leave it out",
    "--moe-z-loss-coeff": "the policy's gradient is the only one; leave it out",
    "--moe-router-load-balancing-type": "the policy's gradient is the only one; leave it out",
    "--moe-router-fusion": "it goes past the routing replay; leave it out",
    "--cuda-graph-impl": "packs differ in length; leave it out",
    **dict.fromkeys(
        (
            "--fp8-margin",
            "--fp8-interval",
            "--fp8-amax-history-len",
            "--fp8-amax-compute-algo",
            "--no-fp8-wgrad",
            "--disable-fp8-wgrad",
            "--tp-only-amax-red",
        ),
        "it belongs to delayed scaling, under which old and new log-probs differ; see --fp8-preset and --fp8-backward",
    ),
    "--fp8-param-gather": "weights would exist in FP8 only, and exports and weight sync need them whole; leave it out",
    "--fp8-output-proj": "log-probs come from a BF16 output layer; leave it out",
    "--skip-train": "use python -m megatron_fipo.evaluate",
    "--rampup-batch-size": "every update has --global-batch-size samples",
    "--decrease-batch-size-if-needed": "every update has --global-batch-size samples",
    "--use-checkpoint-args": "the architecture comes from --hf-model",
    "--no-save-optim": "a run that cannot continue exactly is not saved",
    "--no-load-optim": "use --finetune",
    "--profile": "phase times are in metrics.jsonl under time/",
}
_REFUSED_FAMILIES = {
    "--rl-": "it belongs to megatron.rl; see --help for the --rollout-* flags",
    "--exit-": "a run ends after --num-steps, and on SIGTERM or SIGUSR1 with all it has",
    "--non-persistent-": "use --save-interval and --keep-last",
    "--tensorboard-": "metrics go to RUNS_DIR/RUN_NAME/metrics.jsonl and tensorboard/",
    "--fp4-": "FP4 training is not supported yet; leave it out",
    "--log-": "every metric is logged at every step, to metrics.jsonl and tensorboard/",
}
_PRETRAINING_DATA = (
    "--data-path",
    "--train-data-path",
    "--valid-data-path",
    "--test-data-path",
    "--data-args-path",
    "--per-split-data-args-path",
    "--mock-data",
    "--sft",
    "--eval-iters",
    "--split",
)


def check_command_line(argv: Sequence[str]) -> None:
    """Refuse Megatron flags that would be ignored. Raises UserError naming the flag and what to use instead."""
    for flag in (word.split("=")[0] for word in argv if word.startswith("--")):
        if flag in _REFUSED:
            raise UserError(f"{flag} is not used here: {_REFUSED[flag]}")
        if flag in _PRETRAINING_DATA:
            raise UserError(f"{flag} is for pre-training; give prompts with --prompt-data")
        for family, instead in _REFUSED_FAMILIES.items():
            if flag.startswith(family):
                raise UserError(f"{flag} is not used here: {instead}")
