"""Log-probs, entropies and accumulated weight gradients of several layouts against one process with full logits.

    torchrun --nproc-per-node 2 tests/parallel/logprob_worker.py TIED_HF_DIR UNTIED_HF_DIR

with tests/ and tests/unit/ on PYTHONPATH. Prints one line for each case that agrees; the first that does not raises.
"""

import contextlib
import logging
import sys

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from test_model_logprob import pack, random_sequences
from tiny_models import megatron_args

from megatron_fipo import compat
from megatron_fipo.checkpoint.hf import export_hf_weights, load_hf_weights
from megatron_fipo.model.build import model_provider
from megatron_fipo.model.chunked_logprob import ALIGNMENT, TILE_BYTES, log_probs_of_labels
from megatron_fipo.model.logprob import packed_log_probs

VOCAB, TEMPERATURE, TOKENS = 300, 0.7, 300
SMALL_TILE = 4 * ALIGNMENT**2  # cuts tokens and vocabulary, also a half of it
LENGTHS = ([121, 61, 121], [30, 272])  # of the sequences of each micro-batch; one position fewer each


def micro_batches():
    """Two packs of TOKENS positions whose first third of each sequence is the prompt, and their upstream gradients."""
    batches = []
    for seed, lengths in enumerate(LENGTHS):
        batch = pack(random_sequences(lengths, VOCAB, seed))
        for start, end in zip(batch.cu_seqlens_S1[:-1], batch.cu_seqlens_S1[1:], strict=True):
            batch.response_mask_T[start : start + (end - start) // 3] = False
        assert batch.tokens_T.numel() == TOKENS
        batches.append((batch, torch.randn(TOKENS, generator=torch.Generator().manual_seed(seed + 10))))
    return batches


@contextlib.contextmanager
def model_parallel(tp: int = 1, pp: int = 1):
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    yield
    parallel_state.destroy_model_parallel()


def build(hf_dir: str, flags: str = ""):
    args = megatron_args(hf_dir, *flags.split(), vocab_multiple=16)
    model = model_provider(args)(
        parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage(), pg_collection=None
    )
    load_hf_weights([model], hf_dir)
    return model


def log_probs(model, batch, **kwargs):
    return packed_log_probs(
        model, batch, temperature=TEMPERATURE, vocab_size=VOCAB, **{"tile_bytes": SMALL_TILE} | kwargs
    )


def reference(hf_dir: str):
    """One process, logits of a whole micro-batch: [(logp, entropy)], and gradients by HF name."""
    with model_parallel():
        model = build(hf_dir)
        results = []
        for batch, upstream_T in micro_batches():
            logp_T, entropy_T = log_probs(model, batch, with_entropy=True, tile_bytes=TILE_BYTES)
            (logp_T * upstream_T).sum().backward()
            results.append((logp_T.detach(), entropy_T))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.grad)
        return results, {name: grad.clone() for name, grad in export_hf_weights([model], VOCAB)}


def wrap(model, **ddp):
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **ddp)
    return DistributedDataParallel(model.config, settings, model)


def run(model, share):
    """Forward and backward over micro-batches through Megatron's schedule; returns log-probs on the last stage."""
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.no_sync_func = model.no_sync
    model.zero_grad_buffer()

    def forward(batches, model):
        batch, upstream_T = next(batches)

        def loss(logp_T):
            return (logp_T * upstream_T).sum(), torch.tensor(0, dtype=torch.int), logp_T.detach()

        return log_probs(model, batch), loss

    return get_forward_backward_func()(
        forward_step_func=forward, data_iterator=iter(share), model=model, num_microbatches=len(share),
        seq_length=TOKENS, micro_batch_size=1, forward_only=False,
    )  # fmt: skip


def check_layout(hf_dir: str, expected, tp: int = 1, pp: int = 1, flags: str = "", fused: bool = False, **ddp):
    results, gradients = expected
    with model_parallel(tp, pp):
        model = wrap(
            build(hf_dir, f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp} {flags}"), **ddp
        )
        model.config.gradient_accumulation_fusion = fused  # of the output layer alone: the others have read it
        mine = slice(None) if tp * pp > 1 else slice(dist.get_rank(), dist.get_rank() + 1)
        share, results = micro_batches()[mine], results[mine]
        old = []
        if pp == 1:
            with torch.no_grad():
                old = [log_probs(model, batch, with_entropy=True) for batch, _ in share]
        new = run(model, share)
        for i, (logp_T, entropy_T) in enumerate(results if parallel_state.is_pipeline_last_stage() else ()):
            close(new[i], logp_T, 2e-6, "log-probs")
            if old:
                close(old[i][1], entropy_T, 2e-6, "entropies")
                assert torch.equal(old[i][0], new[i]), "with and without gradients"
        plain = unwrap_model(model)
        if pp == 1:
            with torch.no_grad():
                for parameter in plain.parameters():
                    parameter.copy_(parameter.main_grad)
            found = dict((n, g.clone()) for n, g in export_hf_weights([model], VOCAB))
            assert found.keys() == gradients.keys()
        elif plain.post_process:
            tied = plain.share_embeddings_and_output_weights
            name = "model.embed_tokens.weight" if tied else "lm_head.weight"
            found = {name: plain.output_layer.weight.main_grad[:VOCAB]}
        else:
            found = {"model.embed_tokens.weight": plain.embedding.word_embeddings.weight.main_grad[:VOCAB]}
        for name, gradient in found.items():
            close(gradient, gradients[name], 5e-6, f"gradient of {name}")


def check_overlapped_gather(hf_dir: str, pp: int = 1, flags: str = ""):
    """The output layer's weight is read after its all-gather has ended, though the layer is never called."""
    found = []
    for overlap in (False, True):
        with model_parallel(pp=pp):
            model = wrap(
                build(hf_dir, f"--pipeline-model-parallel-size {pp} {flags}"), bucket_size=4096,
                use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=overlap,
            )  # fmt: skip
            settings = OptimizerConfig(lr=1e-2, use_distributed_optimizer=True, overlap_param_gather=overlap)
            optimizer = get_megatron_optimizer(settings, [model])
            share = micro_batches()
            for _ in range(3):
                optimizer.zero_grad()
                logp = run(model, share)
                assert optimizer.step()[0]
            found.append(logp)
            if overlap:
                model.disable_forward_pre_hook()
    assert all(map(torch.equal, *found)), "overlapped parameter gather changes log-probs"


def check_empty_shard_and_empty_rows():
    """The second rank holds padding alone; then no row wants a log-prob."""
    generator = torch.Generator().manual_seed(3)
    weight_VH, rank = torch.randn(400, 16, generator=generator), dist.get_rank()
    for rows in (140, 0):
        hidden_RH = torch.randn(rows, 16, generator=generator, requires_grad=True)
        labels_R = torch.randint(0, 190, (rows,), generator=generator)
        shard_VH = weight_VH[200 * rank : 200 * (rank + 1)].clone().requires_grad_()
        logp_R, entropy_R = log_probs_of_labels(
            hidden_RH, shard_VH, labels_R, vocab_size=190, with_entropy=True, group=dist.group.WORLD,
            tile_bytes=SMALL_TILE,
        )  # fmt: skip
        logp_R.sum().backward()
        expected_RV = (hidden_RH.detach() @ weight_VH[:190].T).log_softmax(1)
        close(logp_R.detach(), expected_RV.gather(1, labels_R[:, None])[:, 0], 1e-5, "log-probs")
        close(entropy_R, -(expected_RV.exp() * expected_RV).sum(1), 1e-5, "entropies")
        for gradient in (shard_VH.grad, hidden_RH.grad):
            assert gradient is not None and gradient.isfinite().all()
            assert bool(gradient.any()) == (rows > 0 and rank == 0)


def close(found, expected, tolerance: float, what: str):
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    gap = float((found - expected).abs().max()) if expected.numel() else 0.0
    assert found.shape == expected.shape and gap <= tolerance * scale, f"{what}: {gap:.1e} of {scale:.1e}"


def main():
    compat.install()
    logging.getLogger("megatron").setLevel(logging.WARNING)
    dist.init_process_group("gloo")
    folders = dict(zip(("tied", "untied"), sys.argv[1:], strict=True))
    expected = {kind: reference(folder) for kind, folder in folders.items()}
    pipeline = dict(pp=2, flags="--decoder-first-pipeline-num-layers 2")
    layouts = {
        "TP2": dict(tp=2),
        "TP2 SP": dict(tp=2, flags="--sequence-parallel"),
        "TP2 SP fused": dict(tp=2, flags="--sequence-parallel", fused=True),
        "DP2": dict(),
        "DP2 overlapped": dict(overlap_grad_reduce=True),
        "DP2 overlapped fused": dict(overlap_grad_reduce=True, fused=True),
        "PP2": pipeline,
    }
    cases = {
        f"{layout} {kind}": lambda kind=kind, settings=settings: check_layout(folders[kind], expected[kind], **settings)
        for layout, settings in layouts.items()
        for kind in folders
    }
    cases["overlapped parameter gather"] = lambda: check_overlapped_gather(folders["untied"])
    cases["overlapped parameter gather PP2"] = lambda: check_overlapped_gather(folders["tied"], **pipeline)
    cases["empty"] = check_empty_shard_and_empty_rows
    for name, case in cases.items():
        try:
            case()
        except Exception as error:
            error.add_note(f"case {name}, rank {dist.get_rank()}")
            raise
        if dist.get_rank() == 0:
            print(f"agrees: {name}", flush=True)
    dist.destroy_process_group()


main()
