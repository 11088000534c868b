"""Arguments to objects: everything that train.py works with, built so that mistakes are found as early as possible."""

import argparse
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.training import training
from megatron.training.global_vars import set_global_variables
from megatron.training.initialize import initialize_megatron

from megatron_fipo.checkpoint.hf import load_hf_weights
from megatron_fipo.checkpoint.start import check_same_start
from megatron_fipo.checkpoint.state import Checkpoints, LoopState
from megatron_fipo.data.planning import UpdatePlan
from megatron_fipo.data.prompts import PromptStream
from megatron_fipo.errors import SharedUserError, UserError
from megatron_fipo.evaluation.accuracy import EvaluationSet
from megatron_fipo.inputs import Inputs
from megatron_fipo.loss import AdvantageConfig, CorrectionConfig, LossConfig
from megatron_fipo.model.build import model_provider
from megatron_fipo.model.policy import Policy
from megatron_fipo.model.reference import ReferenceWeights
from megatron_fipo.observe.console import Console
from megatron_fipo.observe.efficiency import Efficiency
from megatron_fipo.observe.peaks import peak_flops
from megatron_fipo.observe.run_folder import RunFolder
from megatron_fipo.observe.timers import PhaseTimer
from megatron_fipo.observe.trackers import open_trackers
from megatron_fipo.observe.writers import MetricWriter
from megatron_fipo.parallel.interruption import Interruption
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.recorder import Recorder
from megatron_fipo.rewards.answers import Answers
from megatron_fipo.rollout.collect import CollectSettings
from megatron_fipo.rollout.embedded import EmbeddedEngine
from megatron_fipo.rollout.engine import RolloutEngine, SamplingParams
from megatron_fipo.rollout.functions import FunctionResponder
from megatron_fipo.rollout.responder import Responder, SingleTurn
from megatron_fipo.rollout.sglang import factory
from megatron_fipo.settings import (
    advantage_config,
    collect_settings,
    correction_config,
    cost_model,
    loss_config,
    planner,
)


@dataclass(frozen=True)
class Session:
    """One training run, ready to go."""

    policy: Policy
    engine: RolloutEngine
    responder: Responder
    replicas: Replicas
    checkpoints: Checkpoints
    interruption: Interruption
    state: LoopState
    stream: PromptStream
    collect: CollectSettings
    loss: LossConfig
    advantage: AdvantageConfig
    reference: ReferenceWeights | None
    correction: CorrectionConfig
    plan: Callable[[Sequence[int]], list[UpdatePlan]]
    eval_sets: tuple[EvaluationSet, ...]
    eval_sampling: SamplingParams
    answers: Answers
    console: Console
    timer: PhaseTimer
    recorder: Recorder


def open_session(args: argparse.Namespace, inputs: Inputs) -> Session:
    """Start Megatron, build model and optimizer, load weights or a checkpoint, open the run's folder."""
    if "MASTER_ADDR" not in os.environ:
        raise UserError(
            "no launcher: start with 'torchrun --nproc-per-node N -m megatron_fipo.train ...', N = 1 included"
        )
    folder = RunFolder(Path(args.runs_dir), args.run_name)
    folder.create()
    stream = PromptStream(inputs.prompts, args.seed, weights=args.prompt_weights)
    first = args.rank == 0
    console = Console(args.num_steps, enabled=first)
    if args.start_note:
        console.note(args.start_note)
    with megatron_log(folder.path / "megatron.log" if first else Path(os.devnull)):
        chunks, optimizer, scheduler = start_megatron(args)
        replicas = Replicas.current()
        checkpoints = Checkpoints(
            folder.checkpoints, args, chunks, optimizer, scheduler, args.keep_last, console.note, replicas
        )
        state = _load(args, stream, checkpoints, chunks, optimizer)
    if state.step:
        console.note(f"loaded step {state.step} of {args.load_run}")
    if state.leftovers and state.leftovers.table.shape[1] != args.grpo_group_size:
        console.note("the groups that it left over do not have --grpo-group-size samples, and are dropped")
        state = replace(state, leftovers=None)
    stream.cursor = state.prompt_cursor
    timer = PhaseTimer(torch.cuda.synchronize if torch.cuda.is_available() else None)
    policy = Policy(
        chunks, optimizer, scheduler, args.vocab_size, args.rollout_temperature, args.seq_length, replicas.context
    )
    reference = None
    if args.grpo_kl_beta and not args.rollout_only:
        reference = ReferenceWeights(chunks, args.reference_model or args.hf_model)
    loss = loss_config(args)
    records = first and not args.rollout_only
    writer = _open_writer(args, folder, state, console) if records else None
    stop = inputs.answers.stop_token_ids
    engine = open_engine(args, folder, chunks, replicas)
    return Session(
        policy=policy,
        engine=engine,
        responder=open_responder(args, inputs, engine, replicas),
        replicas=replicas,
        checkpoints=checkpoints,
        interruption=Interruption(replicas.device),
        state=state,
        stream=stream,
        collect=collect_settings(args, stop),
        loss=loss,
        advantage=advantage_config(args),
        reference=reference,
        correction=correction_config(args),
        plan=planner(args),
        eval_sets=inputs.eval_sets,
        eval_sampling=SamplingParams(args.rollout_max_tokens, 1.0, args.eval_top_p, stop),
        answers=inputs.answers,
        console=console,
        timer=timer,
        recorder=Recorder(folder, writer, console, timer, replicas, loss, _efficiency(args), inputs.answers.tokenizer),
    )


def as_one_rank() -> None:
    """One process needs no torchrun: set what it would have set."""
    if "RANK" in os.environ:
        return
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {key: str(value) for key, value in (alone | {"MASTER_PORT": port}).items()}


def report(error: UserError) -> None:
    """Tell a mistake in one line on stderr.

    Before the start every rank of a node finds the same one, and one tells it; later perhaps one rank alone finds it.
    """
    alone = dist.is_initialized() and not isinstance(error, SharedUserError)
    if alone or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"megatron_fipo: {error}", file=sys.stderr)


def start_megatron(args: argparse.Namespace) -> tuple[list[Any], Any, Any]:
    """Process groups, and the model with random weights: its chunks, optimizer and schedule."""
    initialize(args)
    return training.setup_model_and_optimizer(ModelType.encoder_or_decoder, model_provider(args))


def load_model(args: argparse.Namespace, note: Callable[[str], None]) -> list[Any]:
    """Process groups, and the model's chunks with the weights of --hf-model or --load, to generate with only."""
    initialize(args)
    chunks = training.get_model(model_provider(args), ModelType.encoder_or_decoder, wrap_with_ddp=False)
    if args.load_run:
        folder = Path(args.load_run)
        checkpoints = Checkpoints(folder, args, chunks, None, None, args.keep_last, note, Replicas.current())
        checkpoints.load_weights(folder)
    else:
        load_hf_weights(chunks, args.hf_model)
    return chunks


def initialize(args: argparse.Namespace) -> None:
    """Megatron's global variables and process groups."""
    set_global_variables(args, build_tokenizer=False)
    initialize_megatron(allow_no_cuda=not torch.cuda.is_available())


def _load(
    args: argparse.Namespace, stream: PromptStream, checkpoints: Checkpoints, chunks: list[Any], optimizer: Any
) -> LoopState:
    """Weights from the Hugging Face folder, or a checkpoint; the state of the loop that goes with them."""
    check_same_start(args.runs_dir, args.load_run)
    if not args.load_run:
        load_hf_weights(chunks, args.hf_model)
        optimizer.reload_model_params()  # fp32 main copies, where there are any
        return LoopState(prompts=stream.fingerprint)
    if args.finetune:
        checkpoints.load_weights(Path(args.load_run))
        return LoopState(prompts=stream.fingerprint)
    state = checkpoints.load(Path(args.load_run))
    if args.prompt_data and state.prompts != stream.fingerprint:
        raise UserError(
            f"--load {args.load_run} was trained with another --prompt-data, --max-prompt-tokens or --seed, so its "
            f"place in the prompts means nothing here; give the same ones, or start from its weights with --finetune"
        )
    left = args.num_steps - state.step  # none: the run was interrupted between its last checkpoint and its last words
    if left < 0 or (left == 0 and not checkpoints.are_in(args.load_run)):
        raise UserError(
            f"--load {args.load_run} holds step {state.step} of --num-steps {args.num_steps}; raise --num-steps"
        )
    return state


def open_engine(args: argparse.Namespace, folder: RunFolder, chunks: list[Any], replicas: Replicas) -> RolloutEngine:
    """The engine that --rollout-engine names; collective over all ranks."""
    if args.rollout_engine == "embedded":
        engine = EmbeddedEngine(chunks, args.vocab_size, args.rollout_max_running, pad_id=0)
        if not args.train_from_rollouts:
            engine.check_memory(args.max_prompt_tokens, args.seq_length)
        return engine
    fleet = factory.open_fleet(args, folder.path / "sglang")
    return factory.open_engine(args, fleet, factory.open_weight_sync(args, chunks, fleet), replicas)


def open_responder(args: argparse.Namespace, inputs: Inputs, engine: RolloutEngine, replicas: Replicas) -> Responder:
    """The engine alone, or together with --rollout-function."""
    if inputs.rollout_function is None:
        return SingleTurn(engine)
    return FunctionResponder(inputs.rollout_function, engine, replicas, inputs.answers.tokenizer, args.vocab_size)


def _efficiency(args: argparse.Namespace) -> Efficiency:
    precision = "fp8" if args.fp8 else "bf16" if args.bf16 else "fp32"
    peak = peak_flops(torch.cuda.get_device_name(), precision) if torch.cuda.is_available() else None
    return Efficiency(cost_model(args), args.world_size, args.max_tokens_per_microbatch, peak)


def _open_writer(args: argparse.Namespace, folder: RunFolder, state: LoopState, console: Console) -> MetricWriter:
    folder.truncate_after(state.step or -1)  # of an interrupted run that starts over, nothing stays
    folder.summary.unlink(missing_ok=True)
    folder.write_arguments(vars(args))
    folder.write_environment()
    return MetricWriter(folder, open_trackers(args.wandb, folder, console.note, continues=state.step > 0))


@contextlib.contextmanager
def megatron_log(path: Path) -> Iterator[None]:
    """Megatron prints a thousand lines as it starts; they belong into a file, not between the run's own lines.

    What it logs, and every Python warning, goes there for the whole run; errors to stderr as well.
    """
    to_stderr = logging.StreamHandler()
    to_stderr.setLevel(logging.ERROR)
    logging.basicConfig(handlers=[logging.FileHandler(path), to_stderr], force=True)
    logging.captureWarnings(True)
    with open(path, "a") as log, contextlib.redirect_stdout(log):
        yield
