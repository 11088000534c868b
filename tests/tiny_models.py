"""Tiny random models in both formats."""

import contextlib
import io
import sys
from pathlib import Path

import numpy as np
import torch

LOCAL_FLAGS = """
    --transformer-impl local --distributed-backend gloo --use-cpu-initialization --no-masked-softmax-fusion
    --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --no-gradient-accumulation-fusion
    --no-persist-layer-norm --rerun-mode disabled --calculate-per-token-loss --micro-batch-size 1 --seq-length 128
    --lr 1e-3 --train-iters 1 --make-vocab-size-divisible-by 8
"""


def write_hf_model(
    folder: Path, family: str, *, tied: bool, vocab_size: int = 93, dtype=torch.float32, seed: int = 0, **settings
):
    """Write a tiny random model with a tokenizer; return the transformers model.

    `family` is "llama" (with Llama 3's RoPE), "qwen2", "qwen3" or "qwen3_moe" (a dense layer, then two with four
    experts each); `settings` change its configuration.
    """
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    llama3_rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    classes = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 32}),
        "llama": (
            transformers.LlamaConfig,
            transformers.LlamaForCausalLM,
            {"rope_parameters": llama3_rope, "max_position_embeddings": 16384},
        ),
        "qwen3_moe": (
            transformers.Qwen3MoeConfig,
            transformers.Qwen3MoeForCausalLM,
            {
                "head_dim": 32,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 48,
                "norm_topk_prob": True,
                "mlp_only_layers": [0],
            },
        ),
    }
    config_class, model_class, extra = classes[family]
    shape = dict(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        vocab_size=vocab_size, max_position_embeddings=512, tie_word_embeddings=tied, initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = config_class(**(shape | extra | settings))
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # zeros and ones would hide a mix-up
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2").save_pretrained(folder)
    return model


def megatron_args(hf_dir: str | Path, *flags: str, vocab_multiple: int = 8):
    """Megatron's arguments for the model of an HF folder."""
    from megatron.training.arguments import parse_args, validate_args

    from megatron_fipo.model.fp8_training import add_precision_flags
    from megatron_fipo.model.hf_config import megatron_arguments

    def defaults(parser):
        add_precision_flags(parser.add_argument_group("precision"))
        parser.set_defaults(**megatron_arguments(hf_dir))
        return parser

    argv, sys.argv = sys.argv, ["test", *LOCAL_FLAGS.split(), *flags]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            args = parse_args(defaults)
            args.padded_vocab_size = -(-args.vocab_size // vocab_multiple) * vocab_multiple
            validate_args(args, {"tokenizer_type": "NullTokenizer"})
    finally:
        sys.argv = argv
    return args


def megatron_model(hf_dir: Path, *flags: str):
    """The Megatron model of an HF folder with its weights, as the list of chunks that Megatron's set-up returns."""
    from megatron_fipo.checkpoint.hf import load_hf_weights
    from megatron_fipo.model.build import model_provider

    model = [model_provider(megatron_args(hf_dir, *flags))()]
    load_hf_weights(model, hf_dir)
    return model


def trainer_log_probs(chunks, prompt, completion, temperature: float, vocab_size: int):
    """The trainer's log-probs of a completion's tokens."""
    from megatron_fipo.data.packing import pack
    from megatron_fipo.data.samples import Sample
    from megatron_fipo.model.logprob import packed_log_probs

    tokens = np.array([*prompt, *completion.tokens], np.int32)
    n = len(tokens)
    sample = Sample(0, 0, tokens, np.ones(n, bool), np.zeros(n, np.float32), "stop", (), 0.0, False)
    batch = pack([sample], [0])
    with torch.no_grad():
        return packed_log_probs(chunks[0], batch, temperature=temperature, vocab_size=vocab_size)[len(prompt) - 1 :]
