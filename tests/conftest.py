"""Fixtures for tests of the real engine: one Megatron process, and tiny random Hugging Face models."""

import contextlib
import io
import sys
from pathlib import Path

import pytest
import torch

LOCAL_FLAGS = """
    --transformer-impl local --distributed-backend gloo --use-cpu-initialization --no-masked-softmax-fusion
    --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --no-gradient-accumulation-fusion
    --no-persist-layer-norm --rerun-mode disabled --calculate-per-token-loss --micro-batch-size 1 --seq-length 128
    --lr 1e-3 --train-iters 1 --make-vocab-size-divisible-by 8
"""


@pytest.fixture(scope="session")
def megatron(tmp_path_factory):
    """A Megatron world of one process (gloo), as every test of the model needs it."""
    from megatron_fipo import compat

    compat.install()
    from megatron.core import parallel_state, tensor_parallel

    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


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


def megatron_model(hf_dir: Path, *flags: str):
    """The Megatron model of an HF folder with its weights, as the list of chunks that Megatron's set-up returns."""
    from megatron.training.arguments import parse_args, validate_args

    from megatron_fipo.checkpoint.hf import load_hf_weights
    from megatron_fipo.model.build import model_provider
    from megatron_fipo.model.hf_config import megatron_arguments

    def defaults(parser):
        parser.set_defaults(**megatron_arguments(hf_dir))
        return parser

    argv, sys.argv = sys.argv, ["test", *LOCAL_FLAGS.split(), *flags]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            args = parse_args(defaults)
            args.padded_vocab_size = -(-args.vocab_size // 8) * 8
            validate_args(args, {"tokenizer_type": "NullTokenizer"})
    finally:
        sys.argv = argv
    model = [model_provider(args)()]
    load_hf_weights(model, hf_dir)
    return model


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory):
    """hf_model(family, tied=..., ...) -> (folder, transformers model), made once for each set of arguments."""
    made: dict = {}

    def get(family: str, **kwargs):
        key = (family, *sorted(kwargs.items(), key=str))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            made[key] = folder, write_hf_model(folder, family, **kwargs)
        return made[key]

    return get


@pytest.fixture(scope="session")
def build_model(megatron):
    """build_model(folder, *megatron_flags) -> model chunks."""
    return megatron_model


@pytest.fixture(scope="session")
def trained_base(tmp_path_factory) -> Path:
    """A base model that guesses answers to sums, right one time in sixteen; made in a second.

    The Hugging Face folder also holds train.jsonl and heldout.jsonl, as the quickstart's does.
    """
    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    import make_base_model

    folder = tmp_path_factory.mktemp("base") / "model"
    settings = make_base_model.Settings(
        seed=5, hidden_size=32, layers=1, iterations=150, batch_size=64, learning_rate=1e-2,
        direct=1.0, step_error=0.0, heldout=64, train=400, warmup=4000,
    )  # fmt: skip
    make_base_model.write_folder(folder, settings)
    return folder
