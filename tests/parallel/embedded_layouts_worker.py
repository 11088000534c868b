"""The embedded engine in several layouts against the engine of a single process, token for token.

    torchrun --nproc-per-node 4 tests/parallel/embedded_layouts_worker.py QWEN2_TIED_DIR QWEN3_DIR QWEN3_MOE_DIR

with tests/ on PYTHONPATH. Prints one line for each case that agrees; the first that does not raises.
"""

import contextlib
import logging
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from tiny_models import megatron_args

from megatron_fipo import compat
from megatron_fipo.checkpoint.hf import load_hf_weights
from megatron_fipo.data.encoding import load_tokenizer
from megatron_fipo.data.prompts import Prompt
from megatron_fipo.model.build import model_provider
from megatron_fipo.model.policy import Policy
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rollout import embedded
from megatron_fipo.rollout.embedded import EmbeddedEngine
from megatron_fipo.rollout.engine import SamplingParams
from megatron_fipo.rollout.functions import FunctionResponder, RolloutFunction

VOCAB, MAX_BATCH = 93, 4
TP2, CP2, PP2 = (f"--{kind}-parallel-size 2" for kind in ("tensor-model", "context", "pipeline-model"))
EP2 = "--expert-model-parallel-size 2"
UNEVEN = "--decoder-first-pipeline-num-layers 2"  # the models have three layers
FOUR_CHUNKS = "--pipeline-model-parallel-layout Et|t|t|L"  # the last one holds no layer
LAYOUTS = {
    "TP2 SP": ("qwen2", f"{TP2} --sequence-parallel"),
    "TP4 SP": ("qwen3", "--tensor-model-parallel-size 4 --sequence-parallel"),  # more ranks than key/value heads
    "PP2": ("qwen3", f"{PP2} {UNEVEN}"),
    "PP4": ("qwen2", f"--pipeline-model-parallel-size 4 {FOUR_CHUNKS}"),
    "PP2 VPP2": ("qwen3", f"{PP2} {FOUR_CHUNKS}"),
    "CP2": ("qwen2", CP2),
    "CP4": ("qwen3", "--context-parallel-size 4"),
    "TP2 SP PP2": ("qwen3", f"{TP2} --sequence-parallel {PP2} {UNEVEN}"),
    "TP2 SP PP2 VPP2": ("qwen2", f"{TP2} --sequence-parallel {PP2} {FOUR_CHUNKS}"),
    "PP2 CP2": ("qwen3", f"{PP2} {UNEVEN} {CP2}"),
    "TP2 SP CP2": ("qwen3", f"{TP2} --sequence-parallel {CP2}"),
    "EP2": ("qwen3_moe", EP2),
    "PP2 EP2": ("qwen3_moe", f"{PP2} {UNEVEN} {EP2}"),
    "CP2 EP4": ("qwen3_moe", f"{CP2} --expert-model-parallel-size 4"),
    "TP2 SP ETP1 EP2": ("qwen3_moe", f"{TP2} --sequence-parallel {EP2} --expert-tensor-parallel-size 1"),
    "TP2 SP ETP2 EP2": ("qwen3_moe", f"{TP2} --sequence-parallel {EP2} --expert-tensor-parallel-size 2"),
}


def parse(hf_dir: str, flags: str):
    return megatron_args(hf_dir, "--moe-token-dispatcher-type", "alltoall", *flags.split(), vocab_multiple=16)


@contextlib.contextmanager
def parallel(hf_dir: str, flags: str):
    """Megatron's process groups for the layout that the flags describe."""
    args = parse(hf_dir, flags)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    yield
    parallel_state.destroy_model_parallel()


def build(hf_dir: str, flags: str = ""):
    """The chunks of this rank."""
    args = parse(hf_dir, flags)
    stages = args.virtual_pipeline_model_parallel_size
    chunks = [
        model_provider(args)(
            parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            vp_stage=stage,
        )
        for stage in (range(stages) if stages else [None])
    ]
    load_hf_weights(chunks, hf_dir)
    return chunks


def requests():
    """Ragged prompts, some of them repeated, and their seeds."""
    generator = torch.Generator().manual_seed(0)
    distinct = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (5, 1, 17, 30, 2)]
    prompts = [prompt for prompt in distinct for _ in range(2)]
    return prompts, [11 * i + 5 for i in range(len(prompts))]


SAMPLINGS = {
    "greedy": SamplingParams(12, temperature=0.0),
    "sampled, stops": SamplingParams(12, temperature=0.9, top_p=0.95, stop_token_ids=tuple(range(3, 9))),
}


async def dialogue_of_turns(dialogue):
    """A rollout function that goes on for a number of turns of its own, with different limits, on every prompt."""
    turns = len(dialogue.prompt.tokens) % 4
    for turn in range(turns + 1):
        await dialogue.generate(max_tokens=1 + (turns + turn) % 3, stop=["w7"] if turn == 1 else [])
        dialogue.insert([40 + turn])


def generate_all(engine: EmbeddedEngine, hf_dir: str, replica: int, replicas: int):
    """One prompt on the last replica and none on the others; then what a replica generates of its share, both ways;
    then with a rollout function, whose turns differ in number from replica to replica."""
    prompts, seeds = requests()
    few, mine = slice(0, 1 if replica == replicas - 1 else 0), slice(replica, None, replicas)
    done = {"one prompt": engine.generate(prompts[few], seeds[few], SAMPLINGS["sampled, stops"])}
    done |= {name: engine.generate(prompts[mine], seeds[mine], how) for name, how in SAMPLINGS.items()}
    function = RolloutFunction("dialogue_of_turns", dialogue_of_turns)
    responder = FunctionResponder(function, engine, Replicas.current(), load_tokenizer(hf_dir), VOCAB)
    asked = [Prompt(i, tuple(prompt), "", "") for i, prompt in enumerate(prompts)]
    done["turns"] = responder.respond(asked[mine], seeds[mine], SAMPLINGS["sampled, stops"])
    return done


def check_layout(hf_dir: str, flags: str, expected):
    chunks = build(hf_dir, flags)
    modules = [module for chunk in chunks for module in chunk.modules()]
    before = [settings(module) for module in modules]
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    engine = EmbeddedEngine(chunks, VOCAB, MAX_BATCH, pad_id=0)
    assert engine.generate(*requests(), SAMPLINGS["greedy"], given_up=lambda: True) == []
    with contextlib.suppress(ZeroDivisionError):
        engine.generate(*requests(), SAMPLINGS["greedy"], given_up=lambda: 1 // 0)
    assert before == [settings(module) for module in modules], "an error left the model's settings changed"
    found = generate_all(engine, hf_dir, replica, replicas)
    for name, completions in found.items():
        wanted = expected[name]
        if name != "one prompt":
            wanted = wanted[replica::replicas]
        elif replica < replicas - 1:
            wanted = []
        assert len(completions) == len(wanted), name
        for a, b in zip(completions, wanted, strict=True):
            assert (a.tokens, a.finish_reason, a.generated) == (b.tokens, b.finish_reason, b.generated), (name, a, b)
            torch.testing.assert_close(torch.tensor(a.logp), torch.tensor(b.logp), atol=1e-5, rtol=0)
    assert before == [settings(module) for module in modules], "generation changed the model's settings"


def check_memory_that_differs(hf_dir: str, flags: str, expected):
    """The GPU with the least memory decides about its replica's waves; ranks that disagree would wait for ever."""
    engine = EmbeddedEngine(build(hf_dir, flags), VOCAB, None, pad_id=0)
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    known = embedded.free_memory
    embedded.free_memory = lambda device: 60_000 * (1 + dist.get_rank())
    try:
        found = generate_all(engine, hf_dir, replica, replicas)
    finally:
        embedded.free_memory = known
    wanted = expected["greedy"][replica::replicas]
    assert [c.tokens for c in found["greedy"]] == [c.tokens for c in wanted]


def settings(module: torch.nn.Module):
    config = getattr(module, "config", None)
    names = ("sequence_parallel", "reduce_scatter_embeddings", "training")
    return [getattr(module, name, None) for name in names] + [config and config.sequence_parallel]


def reference(hf_dir: str):
    done = generate_all(EmbeddedEngine(build(hf_dir), VOCAB, 64, pad_id=0), hf_dir, 0, 1)
    stopped = done["sampled, stops"]
    assert {c.finish_reason for c in stopped} == {"stop", "length"} and len({len(c.tokens) for c in stopped}) > 3
    return done


def check_overlapped_gather(hf_dir: str):
    """After an update rollouts see all new weights, also where no forward pass would fetch them."""
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    found = []
    for overlap in (False, True):
        model = build(hf_dir)[0]
        settings = DistributedDataParallelConfig(
            bucket_size=4096, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=overlap
        )
        chunk = DistributedDataParallel(model.config, settings, model)
        settings = OptimizerConfig(lr=1e-2, use_distributed_optimizer=True, overlap_param_gather=overlap)
        optimizer = get_megatron_optimizer(settings, [chunk])
        policy = Policy([chunk], optimizer, None, VOCAB, 1.0, 128, parallel_state.get_context_parallel_group())
        engine = EmbeddedEngine([chunk], VOCAB, MAX_BATCH, pad_id=0)
        found.append(generate_all(engine, hf_dir, replica, replicas))
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        assert optimizer.step()[0]
        policy.gather_weights()
        found.append(generate_all(engine, hf_dir, replica, replicas))
        if overlap:
            chunk.disable_forward_pre_hook()
    before, after, before_overlapped, after_overlapped = found
    assert before == before_overlapped and after == after_overlapped and before["greedy"] != after["greedy"]


def check(name: str, case, *arguments):
    try:
        case(*arguments)
    except Exception as error:
        error.add_note(f"case {name}, rank {dist.get_rank()}")
        raise
    if dist.get_rank() == 0:
        print(f"agrees: {name}", flush=True)


def main():
    compat.install()
    logging.getLogger("megatron").setLevel(logging.WARNING)
    dist.init_process_group("gloo", timeout=timedelta(seconds=100))
    folders = dict(zip(("qwen2", "qwen3", "qwen3_moe"), sys.argv[1:], strict=True))
    with parallel(folders["qwen3_moe"], ""):
        expected = {model: reference(folder) for model, folder in folders.items()}
        check("overlapped parameter gather", check_overlapped_gather, folders["qwen3"])
    for layout, (model, flags) in LAYOUTS.items():
        with parallel(folders["qwen3_moe"], flags):
            check(layout, check_layout, folders[model], flags, expected[model])
    for layout in ("TP2 SP PP2", "PP2 EP2"):
        model, flags = LAYOUTS[layout]
        with parallel(folders["qwen3_moe"], flags):
            check(f"{layout}, memory", check_memory_that_differs, folders[model], flags, expected[model])
    dist.destroy_process_group()


main()
