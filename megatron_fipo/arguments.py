"""Flags: Megatron's own, ours beside them, presets and the Hugging Face model as their defaults.

Order of precedence, weakest first: Megatron's defaults, the machine (``platform_defaults``), the preset, the loss, the
model's config.json, the command line.
"""

import argparse
import contextlib
import difflib
import importlib.util
import math
import os
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import fused_unpermute  # TransformerEngine's, or None
from megatron.training import arguments as megatron_arguments
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_fipo.checkpoint.start import find_start
from megatron_fipo.checkpoint.state import check_loadable
from megatron_fipo.errors import UserError
from megatron_fipo.loss.advantage import ADVANTAGES
from megatron_fipo.loss.config import NORMALIZATIONS
from megatron_fipo.loss.kl import KL_ESTIMATORS
from megatron_fipo.model.build import uses_transformer_engine
from megatron_fipo.model.fp8_training import FP8_PRESETS, add_precision_flags
from megatron_fipo.model.hf_config import megatron_arguments as model_arguments
from megatron_fipo.observe.run_folder import RunFolder
from megatron_fipo.presets import DEFAULT_PRESET, LOSS_DEFAULTS, PRESETS
from megatron_fipo.refused_flags import check_command_line
from megatron_fipo.rewards.flags import add_reward_flags
from megatron_fipo.rollout.engine import MAX_RUNNING
from megatron_fipo.rollout.sglang.flags import split_flags
from megatron_fipo.validation import check, expert_parallel_size, model_parallel_size

DESCRIPTION = """Train a reasoning model with FIPO on Megatron.

Start it under torchrun:  torchrun --nproc-per-node N -m megatron_fipo.train --preset fipo-32b --hf-model DIR ...
Our flags come first below; then Megatron-LM's own, of which those of its pre-training loop are refused."""


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as one sentence instead of printing a usage of 800 flags."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see --help")


def build_parser() -> argparse.ArgumentParser:
    """Our flags and Megatron's in one parser."""
    parser = _Parser(
        prog="megatron_fipo.train",
        description=DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="torchrun [...] -m megatron_fipo.train [flags]",
    )
    _add_run_flags(parser.add_argument_group("run"))
    _add_algorithm_flags(parser.add_argument_group("FIPO"))
    _add_rollout_flags(parser.add_argument_group("data and rollouts"))
    add_reward_flags(parser.add_argument_group("rewards"))
    add_precision_flags(parser.add_argument_group("precision"))
    megatron_arguments.add_megatron_arguments(parser)
    for action in parser._actions:  # one of Megatron's help texts has a bare "10%)", on which argparse's --help fails
        action.help = action.help and re.sub(r"(?<!%)%(?![(%])", "%%", action.help)
    return parser


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--preset", choices=sorted(PRESETS), default=DEFAULT_PRESET, help="a set of defaults")
    group.add_argument("--hf-model", metavar="DIR", help="Hugging Face folder: architecture, tokenizer, first weights")
    group.add_argument("--run-name", default="fipo", help="folder of the run below --runs-dir")
    group.add_argument("--runs-dir", default="runs", help="where runs are written")
    group.add_argument("--num-steps", type=int, help="steps to train; a step is one rollout with all its updates")
    group.add_argument("--keep-last", type=int, default=2, metavar="N", help="checkpoints to keep")
    group.add_argument("--save-hf", metavar="DIR", help="keep the newest model here as a Hugging Face folder")
    group.add_argument("--dry-run", action="store_true", help="check everything, print derived values as JSON, stop")


def _add_algorithm_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--loss", choices=list(LOSS_DEFAULTS), help="dapo: influence weights fixed at 1 (docs/algorithm.md)"
    )
    group.add_argument("--loss-normalization", choices=NORMALIZATIONS, help="default: as the loss's paper")
    group.add_argument("--advantage", choices=ADVANTAGES, help="default: batch for reinforce++, else group")
    group.add_argument("--return-gamma", type=float, default=1.0, help="discount per token, for --advantage batch")
    group.add_argument("--reference-model", metavar="DIR", help="for --grpo-kl-beta above 0; default: --hf-model")
    group.add_argument("--kl-estimator", choices=KL_ESTIMATORS, help="default: k3 in the loss, k1 in the reward")
    group.add_argument("--kl-in", choices=["loss", "reward"], help="default: reward for reinforce++, else loss")
    group.add_argument(
        "--fipo-semantics", choices=["official", "paper"], help="where code and paper differ (docs/algorithm.md)"
    )
    group.add_argument("--fipo-half-life", type=float, metavar="TOKENS", help="half-life of the future-KL discount")
    group.add_argument("--fipo-weight-low", type=float, help="lower clip edge of the influence weight")
    group.add_argument("--fipo-weight-high", type=float, help="upper clip edge of the influence weight")
    group.add_argument(
        "--fipo-safety-threshold", type=float, help="ratio above which negative tokens are not amplified"
    )
    group.add_argument(
        "--fipo-dual-clip", type=float, metavar="C", help="dual clip, and the threshold of the future-KL mask"
    )
    group.add_argument(
        "--allow-inactive-fipo",
        action="store_true",
        help="allow one update per rollout, where every influence weight is exactly 1",
    )
    group.add_argument(
        "--max-tokens-per-microbatch",
        type=int,
        metavar="TOKENS",
        help="budget of one pack; a longer sequence gets one of its own",
    )


def _add_rollout_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompt-data",
        nargs="+",
        metavar="PATH",
        help="JSONL, Parquet or Arrow file, folder, or Hub dataset OWNER/NAME",
    )
    group.add_argument(
        "--prompt-weights",
        nargs="+",
        type=float,
        default=[],
        metavar="WEIGHT",
        help="shares of the --prompt-data paths",
    )
    group.add_argument("--prompt-key", metavar="COLUMN", help="of the prompt; default: prompt, problem or question")
    group.add_argument("--answer-key", metavar="COLUMN", help="of the answer; a.b is b within a (docs/data.md)")
    group.add_argument(
        "--problem-template",
        default="none",
        metavar="none|dapo|boxed|TEXT",
        help="goes around bare problems (docs/data.md)",
    )
    group.add_argument(
        "--apply-chat-template",
        action=argparse.BooleanOptionalAction,
        help="default: to prompts that are chat messages, not to text",
    )
    group.add_argument(
        "--eval-data", nargs="+", default=[], metavar="NAME:PATH:N", help="held-out prompts, N samples each"
    )
    group.add_argument("--eval-top-p", type=float, help="top-p of evaluation samples (training samples use 1)")
    group.add_argument("--max-prompt-tokens", type=int, help="longer prompts are dropped and counted")
    group.add_argument(
        "--rollout-engine",
        choices=["embedded", "sglang"],
        default="embedded",
        help="embedded: the training weights; sglang: SGLang servers, which get the weights after every step",
    )
    group.add_argument("--sglang-servers", type=int, metavar="N", help="SGLang servers to start on each node")
    group.add_argument(
        "--sglang-colocate", action="store_true", help="started servers share the GPUs of the trainer's ranks, in turn"
    )
    group.add_argument("--sglang-url", nargs="+", metavar="URL", help="running SGLang servers to use instead")
    group.add_argument(
        "--sglang-host",
        default="127.0.0.1",
        metavar="INTERFACE",
        help="where started servers listen: an interface or address. Any other --sglang-FLAG goes to them as --FLAG",
    )
    group.add_argument(
        "--sglang-port", type=int, metavar="P", help="started servers take P, P+1, ...; default: free ones"
    )
    group.add_argument(
        "--weight-sync-bucket-mb",
        type=int,
        default=512 if torch.cuda.is_available() else 256,
        metavar="MB",
        help="weights go to servers in messages of MB; default: 512 with GPUs, 256 without",
    )
    group.add_argument(
        "--weight-sync-deadline", type=float, default=120.0, metavar="S", help="a server that takes longer is given up"
    )
    group.add_argument(
        "--weight-sync-pause",
        choices=["abort", "retract", "in_place"],
        default="retract",
        help="requests in flight at a sync end, start again from their tokens, or go on with old keys and values",
    )
    group.add_argument(
        "--check-weights", action="store_true", help="compare checksums of trainer and servers after every sync"
    )
    group.add_argument("--rollout-temperature", type=float, help="log-probs are those of logits / temperature")
    group.add_argument("--rollout-max-tokens", type=int, help="longest response")
    group.add_argument(
        "--rollout-function",
        metavar="MODULE:NAME",
        help="your own loop of generation and tools, in training and evaluation (docs/rollout_functions.md)",
    )
    group.add_argument(
        "--rollout-max-running",
        type=int,
        help=f"completions generated at once per replica; default: {MAX_RUNNING}, or what fits on a GPU (embedded)",
    )
    group.add_argument(
        "--rollout-max-batches", type=int, help="generation batches per step before giving up on contrast"
    )
    group.add_argument(
        "--rollout-dynamic-sampling",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train only on groups with right and wrong answers, and generate until there are enough",
    )
    group.add_argument(
        "--rollout-correction",
        nargs="+",
        default=[],
        metavar="KIND:BOUND",
        help="weigh tokens for the gap between engine and trainer: token-tis:C or sequence-tis:C, token-band:LOW:HIGH, "
        "sequence-mask:LOW:HIGH (docs/weight_sync.md)",
    )
    group.add_argument("--rollout-only", metavar="DIR", help="write rollouts to DIR and do not train")
    group.add_argument("--train-from-rollouts", metavar="DIR", help="train on rollouts that --rollout-only wrote")


def parse_arguments(argv: Sequence[str], *, training: bool = True) -> argparse.Namespace:
    """Parse and check a command line; nothing is started. Without ``training`` it is one for evaluate.py.

    Raises UserError naming the flag, the value seen and the fix.
    """
    check_command_line(argv)
    argv, sglang_flags = split_flags(argv)
    parser = build_parser()
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=DEFAULT_PRESET)
    first.add_argument("--loss")
    first.add_argument("--hf-model")
    first.add_argument("--fp8-preset")
    chosen, _ = first.parse_known_args(argv)
    parser.set_defaults(**platform_defaults())
    preset = PRESETS.get(chosen.preset, {})  # an unknown name fails below, as any bad choice does
    parser.set_defaults(**preset)
    parser.set_defaults(**LOSS_DEFAULTS.get(chosen.loss or preset.get("loss", ""), {}))
    parser.set_defaults(**FP8_PRESETS.get(chosen.fp8_preset, {}))
    if chosen.hf_model:
        parser.set_defaults(**model_arguments(chosen.hf_model))

    args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(_unknown_flag(unknown[0], parser))
    args.sglang_flags = sglang_flags
    args.rank = int(os.environ.get("RANK", "0"))
    args.world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if args.dry_run:  # as if started on enough ranks for one replica
        experts = max(1, expert_parallel_size(args)) if args.num_experts else 1
        args.world_size = max(args.world_size, math.lcm(model_parallel_size(args), experts))
    args.command_line = list(argv)
    check(args, training=training)
    if not training:
        args.global_batch_size = args.world_size  # a batch that every layout takes
        args.finetune, args.save_interval = True, None
    _derive(args, training)
    if args.hf_model:
        validate_megatron(args)
    return args


def _unknown_flag(flag: str, parser: argparse.ArgumentParser) -> str:
    if not flag.startswith("--"):
        return f"'{flag}' belongs to no flag; see --help"
    name = flag.split("=")[0]
    near = difflib.get_close_matches(name, parser._option_string_actions, n=1)
    return f"unknown flag {name}" + (f"; did you mean {near[0]}?" if near else "; see --help")


def platform_defaults() -> dict[str, Any]:
    """What every RL run needs from Megatron, and what the machine at hand cannot do."""
    defaults: dict[str, Any] = {
        "micro_batch_size": 1,  # one pack
        "calculate_per_token_loss": True,  # the exact denominator is known after the last micro-batch only
        "dist_ckpt_optim_fully_reshardable": True,
        "ckpt_format": "torch_dist",
        "rerun_mode": "disabled",
        "moe_token_dispatcher_type": "alltoall",  # packs differ in length, which Megatron's default cannot
        "align_param_gather": False,  # aligned, Megatron's own loop would have to start the gathers
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_distributed_optimizer": True,
        "save_interval": None,
        "min_lr": None,  # as --lr
        "override_opt_param_scheduler": True,  # a resumed run may be given more steps
    }
    if torch.cuda.is_available():
        fused_gradients = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None  # of Apex
        return defaults | {
            "bf16": True,
            "moe_grouped_gemm": True,
            # Unfused, a token's experts are added by atomics, in another order on each pass: d would not be 0 where the
            # weights are those of the rollout.
            "moe_permute_fusion": fused_unpermute is not None,
            "gradient_accumulation_fusion": fused_gradients,
        }
    return defaults | {
        "transformer_impl": "transformer_engine" if uses_transformer_engine() else "local",
        "distributed_backend": "gloo",
        "use_cpu_initialization": True,
        "masked_softmax_fusion": False,
        "bias_swiglu_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
    }


def _derive(args: argparse.Namespace, training: bool) -> None:
    """Fill in Megatron's arguments that follow from ours."""
    args.train_iters = args.num_steps  # one learning-rate step per rollout
    args.min_lr = args.lr if args.min_lr is None else args.min_lr
    args.lr_decay_iters = args.lr_decay_iters or max(args.num_steps, args.lr_warmup_iters + 1)
    args.seq_length = args.max_prompt_tokens + args.rollout_max_tokens
    args.max_position_embeddings = max(args.max_position_embeddings or 0, args.seq_length)
    if not uses_transformer_engine(args.transformer_impl):
        # TransformerEngine's kernels: its RoPE, too, reads angles by the position within a sequence, not in the pack.
        args.apply_rope_fusion = args.moe_grouped_gemm = False
    _find_start(args, training)
    args.load = None  # we load after the model is built, see checkpoint/state.py
    names = {"project": "project", "name": "exp_name", "entity": "entity", "dir": "save_dir"}
    args.wandb = {name: getattr(args, f"wandb_{flag}") for name, flag in names.items()}
    args.wandb_project = None  # Megatron would start a run of its own on the last rank
    if args.save_interval:
        args.save = str(RunFolder(Path(args.runs_dir), args.run_name).checkpoints)


def _find_start(args: argparse.Namespace, training: bool) -> None:
    run = RunFolder(Path(args.runs_dir), args.run_name)
    if args.dry_run or args.rollout_only or not training:  # the run's folder is not touched
        if args.load:
            check_loadable(args.load, finetune=args.finetune)
        args.load_run, args.start_note = args.load, None
        return
    start = find_start(
        run,
        args.load,
        finetune=args.finetune,
        command_line=args.command_line,
        saves=bool(args.save_interval),
    )
    args.load_run, args.finetune, args.start_note = start.load, start.weights_only, start.note


def validate_megatron(args: argparse.Namespace) -> None:
    """Derive the padded vocabulary and let Megatron check its arguments. Raises UserError with Megatron's reason."""
    # Megatron prints as it validates; stdout belongs to the run's own lines and to --dry-run's JSON.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            args.padded_vocab_size = calculate_padded_vocab_size(
                args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
            )
            # It accepts --async-save with a persistent worker only, which knows nothing of the patches in compat.
            async_save, args.async_save = args.async_save, False
            megatron_arguments.validate_args(args)
            args.async_save, args.async_strategy = async_save, "mcore"
            args.variable_seq_lengths = True  # packs differ in length; validate_args resets it
            core_transformer_config_from_args(args)  # refuses more, and would do so as late as when it builds the model
        except (AssertionError, ValueError, RuntimeError) as error:
            failed = traceback.extract_tb(error.__traceback__)[-1].line
            raise UserError(f"Megatron refuses these flags: {str(error) or failed}") from error
