"""Trains a reasoning model with FIPO.

    torchrun --nproc-per-node 8 -m megatron_fipo.train --preset fipo-32b --hf-model DIR --prompt-data FILE

One step: generate groups until enough of them have contrast, plan who trains on what, recompute log-probs, turn rewards
into advantages, update several times, publish the weights.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch.distributed as dist

from megatron_fipo import compat
from megatron_fipo.arguments import parse_arguments
from megatron_fipo.arithmetic import banner, batch_arithmetic
from megatron_fipo.checkpoint.hf_write import save_hf
from megatron_fipo.checkpoint.state import LoopState
from megatron_fipo.data.advantages import add_advantages
from megatron_fipo.data.batches import make_micro_batches
from megatron_fipo.data.correction import correct_updates
from megatron_fipo.errors import UserError
from megatron_fipo.evaluation.accuracy import Evaluation, evaluate_sets
from megatron_fipo.inputs import read_inputs
from megatron_fipo.parallel.interruption import Interrupted
from megatron_fipo.rollout.collect import OutOfContrast, collect, groups_to_generate
from megatron_fipo.rollout.interruptible import InterruptibleResponder
from megatron_fipo.rollout.replay import read_rollout, write_rollout
from megatron_fipo.rollout.rollout import Rollout
from megatron_fipo.session import Session, open_session, report


def train(run: Session, args: argparse.Namespace) -> None:
    """The algorithm. Raises, with everything saved, if it ends early.

    Raises:
        OutOfContrast: the prompts have nothing left to teach.
        Interrupted: a signal asked to stop. The model changes in the update phase only, so until then it is the last
            finished step's; a step that has begun to change it is finished.
    """
    state, saved, evaluation, stopped = run.state, run.state.step, None, None
    run.engine.update_weights(state.step)
    if state.step == 0:
        run.recorder.before(evaluate(run))
    elif state.step == args.num_steps:  # interrupted between its last checkpoint and its last words
        evaluation = evaluate(run)
    for step in range(state.step + 1, args.num_steps + 1):
        try:
            run.checkpoints.poll()
            run.interruption.check()
            with run.timer("rollout"):
                rollout = next_rollout(run, args, state)
                if args.reward_overlong_filter:
                    rollout = rollout.without_truncated()
        except (OutOfContrast, Interrupted) as error:
            stopped = error
            break
        run.engine.sleep()

        plan = run.plan(rollout.packed_length_S.tolist())
        updates = make_micro_batches(plan, rollout, run.loss, run.replicas)

        learning_rate = run.policy.advance_schedule(args.global_batch_size)
        with run.timer("old_logp"):
            updates, entropy_sum = run.policy.add_old_log_probs(updates)
            updates, correction = correct_updates(updates, plan, rollout, run.correction, run.loss, run.replicas)
        if run.reference:
            with run.timer("reference"):
                updates = run.policy.add_reference_log_probs(updates, run.reference)
        updates, penalty = add_advantages(updates, rollout, run.advantage, run.replicas)
        with run.timer("update"), run.console.progress("update", len(updates) * args.grpo_iterations) as progress:
            results = []
            for micro_batches in updates * args.grpo_iterations:
                results.append(run.policy.update(micro_batches, run.loss))
                progress.advance()

        run.policy.gather_weights()
        run.engine.wake()
        run.engine.update_weights(step)
        due = step % args.eval_interval == 0 or step == args.num_steps
        # Asked to stop, a run saves at once: an evaluation may take longer than the signal leaves.
        evaluation = evaluate(run) if due and not run.interruption.received() else None
        extra = correction | penalty | run.engine.metrics()
        run.recorder.step(step, rollout, plan, updates, entropy_sum, extra, results, learning_rate, evaluation)
        state = after(run, state, rollout)
        if args.save_interval and step % args.save_interval == 0:
            save(run, state)
            saved = step
            if args.save_hf and step < args.num_steps and not run.interruption.received():
                with run.timer("checkpoint"):
                    save_hf(run.policy.chunks, args.hf_model, args.save_hf)

    interrupted = isinstance(stopped, Interrupted)
    if saved < state.step and (args.save_interval or interrupted):
        save(run, state)
    run.checkpoints.finish()
    if args.save_hf and not interrupted:
        save_hf(run.policy.chunks, args.hf_model, args.save_hf)
    status = "interrupted" if interrupted else "out of contrast" if stopped else "finished"
    run.recorder.finish(state.step, args.seed, evaluation, status)
    if stopped:
        raise stopped


def save(run: Session, state: LoopState) -> None:
    """Write a checkpoint; its time shows in the next step's metrics, since this step's must be on disk before it."""
    with run.timer("checkpoint"):
        run.checkpoints.save(state)


def next_rollout(run: Session, args: argparse.Namespace, state: LoopState) -> Rollout:
    """Generate the next step's samples, or read those that ``--rollout-only`` wrote."""
    if args.train_from_rollouts:
        prompts, group_size = args.grpo_prompts_per_step, args.grpo_group_size
        return read_rollout(args.train_from_rollouts, state.step + 1, prompts, group_size, run.replicas)
    weights = run.state.step if args.rollout_only else state.step  # --rollout-only never updates them
    carried = len(state.leftovers.visits) if state.leftovers else 0
    groups = groups_to_generate(max(1, args.grpo_prompts_per_step - carried), state.contrast_rate, run.collect)
    with run.console.progress("rollout", groups * args.grpo_group_size) as progress:
        return collect(
            InterruptibleResponder(run.responder, run.interruption),
            run.stream,
            run.answers.verify,
            run.collect,
            run.replicas,
            version=weights,
            contrast_rate=state.contrast_rate,
            on_finished=lambda n: progress.advance(n * run.replicas.size),
            leftovers=state.leftovers,
        )


def after(run: Session, state: LoopState, rollout: Rollout) -> LoopState:
    """The loop's state after the step that used ``rollout``."""
    return replace(
        state,
        step=state.step + 1,
        prompt_cursor=run.stream.cursor,
        contrast_rate=rollout.contrast_rate,
        leftovers=rollout.leftovers,
    )


def write_rollouts(run: Session, args: argparse.Namespace) -> None:
    """Generate every step's samples with the weights as they are."""
    state = run.state
    run.engine.update_weights(state.step)
    while state.step < args.num_steps:
        rollout = next_rollout(run, args, state)
        state = after(run, state, rollout)
        write_rollout(args.rollout_only, state.step, rollout, run.replicas)


def evaluate(run: Session) -> Evaluation:
    """Accuracy on the held-out sets."""
    with run.timer("eval"):
        return evaluate_sets(
            run.responder, run.eval_sets, run.eval_sampling, run.answers, run.replicas, run.collect.seed, run.console
        )


def main(argv: Sequence[str]) -> int:
    """Exit code: 0, a stop by a signal included; 2 for a mistake that the user can mend, told in one line on stderr."""
    compat.install()
    try:
        args = parse_arguments(argv)
        if args.dry_run and not args.hf_model:
            print(json.dumps(batch_arithmetic(args), indent=2))
            return 0
        inputs = read_inputs(args)
        if args.dry_run:
            print(json.dumps(batch_arithmetic(args) | inputs.counts(), indent=2))
            return 0
        run = open_session(args, inputs)
        run.console.banner(banner(args) | {"prompts": str(inputs)})
        with contextlib.closing(run.engine):
            try:
                if args.rollout_only:
                    write_rollouts(run, args)
                else:
                    train(run, args)
            except Interrupted:
                run.console.note("stopped by a signal; what was finished is saved")
        dist.destroy_process_group()
    except UserError as error:
        report(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
