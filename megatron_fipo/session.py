"""Arguments to objects: everything that train.py works with, built so that mistakes are found as early as possible."""

import argparse
import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.training import training
from megatron.training.global_vars import set_global_variables
from megatron.training.initialize import initialize_megatron
from transformers import AutoTokenizer

from megatron_fipo.checkpoint import state as checkpoint
from megatron_fipo.checkpoint.hf import load_hf_weights
from megatron_fipo.data.prompts import Prompt, PromptStream, drop_long, read_prompts
from megatron_fipo.errors import UserError
from megatron_fipo.evaluation.accuracy import EvaluationSet
from megatron_fipo.loss import FipoConfig
from megatron_fipo.model.build import model_provider
from megatron_fipo.model.cost import CostModel
from megatron_fipo.model.policy import Policy
from megatron_fipo.observe.console import Console
from megatron_fipo.observe.run_folder import RunFolder
from megatron_fipo.observe.timers import PhaseTimer
from megatron_fipo.observe.writers import MetricWriter
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.recorder import Recorder
from megatron_fipo.rewards.answers import Answers
from megatron_fipo.rewards.verify import check_source
from megatron_fipo.rollout.collect import CollectSettings
from megatron_fipo.rollout.embedded import EmbeddedEngine
from megatron_fipo.rollout.engine import RolloutEngine, SamplingParams
from megatron_fipo.validation import parse_eval_data


@dataclass(frozen=True)
class Session:
    """One training run, ready to go."""

    policy: Policy
    engine: RolloutEngine
    replicas: Replicas
    state: checkpoint.LoopState
    stream: PromptStream
    collect: CollectSettings
    loss: FipoConfig
    cost: CostModel
    eval_sets: tuple[EvaluationSet, ...]
    eval_sampling: SamplingParams
    answers: Answers
    console: Console
    timer: PhaseTimer
    recorder: Recorder


@dataclass(frozen=True)
class Inputs:
    """What a run reads, checked before any process group exists."""

    answers: Answers
    prompts: list[Prompt]
    dropped_prompts: int
    eval_sets: tuple[EvaluationSet, ...]

    def counts(self) -> dict[str, int]:
        """Prompts that training draws from, those dropped for their length, and held-out prompts."""
        return {
            "prompts": len(self.prompts),
            "dropped_prompts": self.dropped_prompts,
            "eval_prompts": sum(len(s.prompts) for s in self.eval_sets),
        }

    def described(self) -> str:
        """The same for a person."""
        n = self.counts()
        dropped = f" ({n['dropped_prompts']:,} too long)" if n["dropped_prompts"] else ""
        return f"{n['prompts']:,}{dropped}, held out {n['eval_prompts']:,}"


def read_inputs(args: argparse.Namespace) -> Inputs:
    """Tokenizer, prompts and evaluation sets. Raises UserError naming file and row."""
    tokenizer = AutoTokenizer.from_pretrained(args.hf_model, local_files_only=True)
    stop = tokenizer.eos_token_id
    encode = functools.partial(tokenizer.encode, add_special_tokens=True)

    def read(paths: Sequence[str]) -> list[Prompt]:
        prompts = read_prompts(paths, encode)
        for source in sorted({p.source for p in prompts}):
            check_source(source)
        return prompts

    prompts = read(args.prompt_data) if args.prompt_data else []
    kept = drop_long(prompts, args.max_prompt_tokens) if prompts else []
    return Inputs(
        answers=Answers(tokenizer, () if stop is None else (stop,)),
        prompts=kept,
        dropped_prompts=len(prompts) - len(kept),
        eval_sets=tuple(
            EvaluationSet(name, tuple(drop_long(read([path]), args.max_prompt_tokens)), samples)
            for name, path, samples in map(parse_eval_data, args.eval_data)
        ),
    )


def open_session(args: argparse.Namespace, inputs: Inputs) -> Session:
    """Start Megatron, build model and optimizer, load weights or a checkpoint, open the run's folder."""
    if "MASTER_ADDR" not in os.environ:
        raise UserError(
            "no launcher: start with 'torchrun --nproc-per-node N -m megatron_fipo.train ...', N = 1 included"
        )
    folder = RunFolder(Path(args.runs_dir), args.run_name)
    folder.create()
    first = args.rank == 0
    console = Console(args.num_steps, enabled=first)
    with _megatron_log(folder.path / "megatron.log" if first else Path(os.devnull)):
        set_global_variables(args, build_tokenizer=False)
        initialize_megatron(allow_no_cuda=not torch.cuda.is_available())
        chunks, optimizer, scheduler = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder, model_provider(args)
        )
        state = _load(args, chunks, optimizer, scheduler)
    replicas = Replicas.current()
    timer = PhaseTimer(torch.cuda.synchronize if torch.cuda.is_available() else None)
    loss = loss_config(args)
    writer = _open_writer(args, folder, state) if first else None
    stop = inputs.answers.stop_token_ids
    return Session(
        policy=Policy(chunks, optimizer, scheduler, args.vocab_size, args.rollout_temperature, args.seq_length),
        engine=EmbeddedEngine(chunks, args.vocab_size, args.rollout_max_running, pad_id=0),
        replicas=replicas,
        state=state,
        stream=PromptStream(inputs.prompts, args.seed, state.prompt_cursor),
        collect=CollectSettings(
            prompts_per_step=args.grpo_prompts_per_step,
            group_size=args.grpo_group_size,
            sampling=SamplingParams(args.rollout_max_tokens, args.rollout_temperature, 1.0, stop),
            seed=args.seed,
            dynamic_sampling=args.rollout_dynamic_sampling,
            max_batches=args.rollout_max_batches,
            overlong_buffer=args.reward_overlong_buffer,
            overlong_penalty=args.reward_overlong_penalty,
        ),
        loss=loss,
        cost=cost_model(args),
        eval_sets=inputs.eval_sets,
        eval_sampling=SamplingParams(args.rollout_max_tokens, 1.0, args.eval_top_p, stop),
        answers=inputs.answers,
        console=console,
        timer=timer,
        recorder=Recorder(folder, writer, console, timer, replicas, loss),
    )


def loss_config(args: argparse.Namespace) -> FipoConfig:
    """The loss's settings from the flags."""
    fipo = args.loss == "fipo"
    return FipoConfig(
        half_life=args.fipo_half_life,
        weight_low=args.fipo_weight_low if fipo else 1.0,
        weight_high=args.fipo_weight_high if fipo else 1.0,
        safety_threshold=args.fipo_safety_threshold,
        dual_clip=args.fipo_dual_clip,
        clip_low=args.grpo_clamp_eps_lower,
        clip_high=args.grpo_clamp_eps_upper,
        semantics=args.fipo_semantics,
        normalization=args.loss_normalization,
        sequence_filter=None if fipo else False,
    )


def cost_model(args: argparse.Namespace) -> CostModel:
    """What a sequence costs on this architecture; dense models."""
    return CostModel(
        layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        heads=args.num_attention_heads,
        kv_heads=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        head_dim=args.kv_channels,
        vocab_size=args.padded_vocab_size,
    )


def _load(args: argparse.Namespace, chunks: list[Any], optimizer: Any, scheduler: Any) -> checkpoint.LoopState:
    if args.load_run:
        return checkpoint.load(args.load_run, args, chunks, optimizer, scheduler)
    load_hf_weights(chunks, args.hf_model)
    optimizer.reload_model_params()  # fp32 main copies, where there are any
    return checkpoint.LoopState()


def _open_writer(args: argparse.Namespace, folder: RunFolder, state: checkpoint.LoopState) -> MetricWriter:
    if state.step:
        folder.truncate_after(state.step)
    else:
        folder.clear_observations()
    folder.write_arguments(vars(args))
    folder.write_environment()
    return MetricWriter(folder)


@contextlib.contextmanager
def _megatron_log(path: Path) -> Iterator[None]:
    """Megatron prints a thousand lines as it starts; they belong into a file, not between the run's own lines.

    What it logs, and every Python warning, goes there for the whole run; errors to stderr as well.
    """
    to_stderr = logging.StreamHandler()
    to_stderr.setLevel(logging.ERROR)
    logging.basicConfig(handlers=[logging.FileHandler(path), to_stderr], force=True)
    logging.captureWarnings(True)
    with open(path, "a") as log, contextlib.redirect_stdout(log):
        yield
