"""What a model computes on the device that there is, in fp32 and bf16, built and called as by training.

    python tests/gpu/whole_model_worker.py MODEL_DIR TRANSFORMER_IMPL OUT [REFERENCE]

Saves {precision: {...}} in OUT: greedy completions of the embedded engine with their log-probs; the trainer's log-probs
of these tokens, and of REFERENCE's, the OUT of another run; whether a pack has the same log-probs in every pass.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from megatron.core.enums import ModelType
from megatron.training import training

from megatron_fipo import compat
from megatron_fipo.arguments import parse_arguments
from megatron_fipo.checkpoint.hf import load_hf_weights
from megatron_fipo.data.packing import pack
from megatron_fipo.data.samples import Sample
from megatron_fipo.model.build import model_provider
from megatron_fipo.model.logprob import packed_log_probs
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rollout.embedded import EmbeddedEngine
from megatron_fipo.rollout.engine import SamplingParams
from megatron_fipo.session import as_one_rank, initialize

TOKENS, PASSES = 24, 6


def batch_of(conversations):
    """One pack of (prompt, response) pairs."""
    samples = [
        Sample(
            prompt_id=i, group_id=i, tokens=np.array([*prompt, *response], dtype=np.int32),
            response_mask=np.arange(len(prompt) + len(response)) >= len(prompt),
            rollout_logp=np.zeros(len(prompt) + len(response), dtype=np.float32), finish_reason="stop",
            weight_versions=((0, 0, len(response)),), reward=0.0, correct=False,
        )
        for i, (prompt, response) in enumerate(conversations)
    ]  # fmt: skip
    return pack(samples, range(len(samples))).to(Replicas.current().device)


def random_tokens(vocab_size: int, lengths, seed: int):
    generator = np.random.default_rng(seed)
    return [generator.integers(3, vocab_size, length).tolist() for length in lengths]


def compute(args, reference) -> dict:
    chunks = training.get_model(model_provider(args), ModelType.encoder_or_decoder, wrap_with_ddp=False)
    load_hf_weights(chunks, args.hf_model)
    prompts = random_tokens(args.vocab_size, (5, 1, 17, 9, 9, 20, 2, 12), seed=0)
    # Without a number of rows: on a GPU they follow from its memory.
    engine = EmbeddedEngine(chunks, args.vocab_size, None, pad_id=0)
    engine.check_memory(20, 20 + TOKENS)
    done = engine.generate(prompts, [0] * len(prompts), SamplingParams(TOKENS, temperature=0.0))
    tokens = [completion.tokens for completion in done]
    result = {"tokens": tokens, "engine": torch.tensor([completion.logp for completion in done])}
    if args.params_dtype == torch.float32:
        return result  # TransformerEngine's attention for packs has no fp32

    def log_probs(batch, **options):
        for chunk in chunks:
            chunk.train()
        return packed_log_probs(chunks[0], batch, temperature=1.0, vocab_size=args.vocab_size, **options)

    for name, texts in (("own", tokens), ("reference", reference or tokens)):
        batch = batch_of(zip(prompts, texts, strict=True))
        with torch.no_grad():
            result[name] = log_probs(batch)[batch.response_mask_T].view(len(prompts), TOKENS).cpu()
    lengths = range(10, 90, 2)
    batch = batch_of(zip(prompts * 5, random_tokens(args.vocab_size, lengths, seed=1), strict=True))
    first = log_probs(batch)
    assert first.requires_grad and first.detach().std() > 0.1
    with torch.no_grad():  # as old log-probs are computed
        result["same"] = all(torch.equal(first, log_probs(batch, with_entropy=True)[0]) for _ in range(PASSES))
    return result


def main(model: str, transformer_impl: str, out: str, *reference: str) -> None:
    compat.install()
    as_one_rank()
    flags = "--preset quickstart --eval-data none:none:1 --max-prompt-tokens 20 --rollout-max-tokens 90 --bf16"
    args = parse_arguments(
        [*flags.split(), "--hf-model", model, "--transformer-impl", transformer_impl], training=False
    )
    initialize(args)
    known = torch.load(Path(reference[0])) if reference else {}
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        args.bf16, args.params_dtype = dtype == torch.bfloat16, dtype
        results[str(dtype)] = compute(args, known.get(str(dtype), {}).get("tokens"))
    torch.save(results, out)
    torch.distributed.destroy_process_group()


main(*sys.argv[1:])
