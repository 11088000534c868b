"""Loads and exports tiny Hugging Face models in several layouts, and compares with the folder and with one process.

    torchrun --nproc-per-node 4 tests/parallel/hf_layouts_worker.py SCRATCH_DIR FAMILY=HF_DIR...

with tests/ and tests/unit/ on PYTHONPATH. Prints one line for each case that agrees; the first that does not raises.
"""

import contextlib
import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file
from test_model_logprob import pack, random_sequences
from tiny_models import megatron_args

from megatron_fipo import compat
from megatron_fipo.checkpoint.hf import export_hf_weights, global_parameters, hf_layout, load_hf_weights
from megatron_fipo.checkpoint.hf_write import save_hf
from megatron_fipo.model.build import model_provider
from megatron_fipo.model.logprob import packed_log_probs

VOCAB = 93
DENSE = ("llama", "qwen2", "qwen3")
EXPERTS = ("qwen3_moe",)
# name -> families, tensor, pipeline, virtual pipeline, expert and expert-tensor parallel sizes; data parallel fills up
LAYOUTS = {
    "DP4": (DENSE + EXPERTS, 1, 1, None, 1, 1),
    "TP2": (DENSE, 2, 1, None, 1, 2),
    "PP2": (DENSE + EXPERTS, 1, 2, None, 1, 1),
    "VPP2": (DENSE + EXPERTS, 1, 2, 2, 1, 1),
    "TP2 PP2": (DENSE + EXPERTS, 2, 2, None, 1, 2),
    "EP2 DP2": (EXPERTS, 1, 1, None, 2, 1),
    "EP4": (EXPERTS, 1, 1, None, 4, 1),
    "ETP2": (EXPERTS, 2, 1, None, 1, 2),
    "TP2 ETP1": (EXPERTS, 2, 1, None, 1, 1),
    "EP2 ETP2": (EXPERTS, 2, 1, None, 2, 2),
    "EP2 PP2": (EXPERTS, 1, 2, None, 2, 1),
    "EP2 VPP2": (EXPERTS, 1, 2, 2, 2, 1),
    "TP2 EP2 PP2": (EXPERTS, 2, 2, None, 2, 1),
}


@contextlib.contextmanager
def layout(tp: int = 1, pp: int = 1, vpp: int | None = None, ep: int = 1, etp: int = 1):
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp,
        expert_model_parallel_size=ep, expert_tensor_parallel_size=etp,
    )  # fmt: skip
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    yield
    parallel_state.destroy_model_parallel()


def build(hf_dir: Path, tp: int = 1, pp: int = 1, vpp: int | None = None, ep: int = 1, etp: int = 1):
    flags = f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp} --expert-model-parallel-size {ep} "
    flags += f"--expert-tensor-parallel-size {etp}"
    flags += " --num-layers-per-virtual-pipeline-stage 1" if vpp else ""
    flags += " --sequence-parallel" if tp > 1 else ""

    args = megatron_args(hf_dir, *flags.split(), vocab_multiple=16)
    chunks = []
    for stage in range(vpp or 1):
        where = {"ignore_virtual": vpp is None, "vp_stage": stage if vpp else None}
        first, last = parallel_state.is_pipeline_first_stage(**where), parallel_state.is_pipeline_last_stage(**where)
        chunks.append(model_provider(args)(first, last, vp_stage=where["vp_stage"]))
    load_hf_weights(chunks, hf_dir)
    return chunks


def log_probs(chunks, tokens: int) -> list[torch.Tensor]:
    """Of two micro-batches, on the last stage."""
    batches = [pack(random_sequences(lengths, VOCAB, seed)) for seed, lengths in enumerate(([20, 30], [11, 39]))]
    assert all(batch.tokens_T.numel() == tokens for batch in batches)

    def forward(iterator, model):
        def keep(logp_T):
            return logp_T.sum(), torch.tensor(0, dtype=torch.int), logp_T

        return packed_log_probs(model, next(iterator), temperature=1.0, vocab_size=VOCAB), keep

    many = len(chunks) > 1
    iterators = [iter(batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward, data_iterator=iterators if many else iterators[0],
        model=chunks if many else chunks[0], num_microbatches=2, seq_length=tokens, micro_batch_size=1,
        forward_only=True,
    )  # fmt: skip


def check(hf_dir: Path, scratch: Path, expected: list[torch.Tensor], sizes: dict[str, int]):
    source = load_file(hf_dir / "model.safetensors")
    chunks = build(hf_dir, **sizes)
    held = sum(p.numel() for p in global_parameters(chunks).values())
    for own_stage in (True, False):
        announced = hf_layout(chunks, VOCAB, own_stage)
        streamed = [(name, tensor.clone()) for name, tensor in export_hf_weights(chunks, VOCAB, own_stage)]
        assert [(t.name, t.shape, t.dtype) for t in announced] == [(n, t.shape, t.dtype) for n, t in streamed]
    assert len(streamed) == len(source) and dict(streamed).keys() == source.keys()
    for name, tensor in streamed:
        assert torch.equal(tensor, source[name]), f"{name} is not the folder's"
    if any(size and size > 1 for size in sizes.values()):
        assert held < 0.8 * sum(t.numel() for t in source.values()), "every rank holds everything"
    save_hf(chunks, hf_dir, scratch / "out")
    if dist.get_rank() == 0:
        written = load_file(scratch / "out" / "model.safetensors")
        assert written.keys() == source.keys() and all(torch.equal(written[n], t) for n, t in source.items())
    if sizes["ep"] > 1 and sizes["etp"] > 1:
        return  # a forward pass gathers tokens of unequal number, which NCCL does and gloo refuses
    found = log_probs(chunks, expected[0].numel())
    for new, old in zip(found, expected if parallel_state.is_pipeline_last_stage() else [], strict=True):
        gap = float((new - old).abs().max())
        assert gap < 5e-6, f"log-probs differ by {gap}"


def main():
    compat.install()
    logging.getLogger("megatron").setLevel(logging.WARNING)
    dist.init_process_group("gloo")
    scratch = Path(sys.argv[1])
    folders = {family: Path(folder) for family, folder in (pair.split("=") for pair in sys.argv[2:])}
    with layout():
        expected = {family: log_probs(build(folder), 48) for family, folder in folders.items()}
    for name, (families, *sizes) in LAYOUTS.items():
        named = dict(zip(("tp", "pp", "vpp", "ep", "etp"), sizes, strict=True))
        with layout(**named):
            for family in families:
                try:
                    check(folders[family], scratch, expected[family], named)
                except Exception as error:
                    error.add_note(f"case {name} {family}, rank {dist.get_rank()}")
                    raise
                if dist.get_rank() == 0:
                    print(f"agrees: {name} {family}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
