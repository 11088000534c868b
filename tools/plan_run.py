"""What a run needs and about how long a step takes: batch arithmetic, memory of a GPU, time, from stated assumptions.

python tools/plan_run.py --preset fipo-32b --gpus 128 --gpu h100 [--tensor-model-parallel-size 8 ...] [--json FILE]

An estimate, made by counting: memory to about a tenth, time to about a factor of two. The architecture is the preset's,
one named with --model, or that of --hf-model; experts are not cut (--expert-tensor-parallel-size 1) and evenly chosen.
Rollouts are those of the embedded engine. Counted are
Megatron's weights, gradients and distributed optimizer in bf16 training (2 + 4 + 12 bytes a parameter), activations as
in Korthikanti et al. 2022 (arXiv 2205.05198) for flash attention, SwiGLU, sequence parallelism and no dropout, and
operations as in megatron_fipo/model/cost.py. Exit code 0, 1 if it does not fit, 2 for a mistake.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.errors import UserError
from megatron_fipo.model.chunked_logprob import TILE_BYTES
from megatron_fipo.model.cost import CostModel
from megatron_fipo.model.generation_memory import kv_bytes
from megatron_fipo.model.hf_config import architecture
from megatron_fipo.observe.peaks import peak_flops
from megatron_fipo.presets import PRESETS

GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """memory in GB, memory bandwidth in TB/s; the maker's data sheet."""

    memory: float
    bandwidth: float


GPUS = {"A100": Gpu(80, 2.0), "H100": Gpu(80, 3.35), "H200": Gpu(141, 4.8), "B200": Gpu(180, 8.0)}


@dataclass(frozen=True)
class Architecture:
    """A decoder; ``extra_per_layer``: parameters of biases and of query and key norms.

    Of a mixture of ``experts``, each ``ffn`` wide, ``active`` answer for a token in every layer; a dense model has 1.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    extra_per_layer: int = 0
    experts: int = 1
    active: int = 1

    @property
    def expert(self) -> int:
        """Parameters of one expert, or of a dense layer's MLP."""
        return 3 * self.hidden * self.ffn

    @property
    def layer_without_experts(self) -> int:
        """Parameters of a layer but for its experts; a dense layer's MLP belongs to it."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        rest = self.hidden * self.experts if self.experts > 1 else self.expert
        return attention + rest + 2 * self.hidden + self.extra_per_layer

    @property
    def experts_of_layer(self) -> int:
        """Parameters of a layer's experts."""
        return self.experts * self.expert if self.experts > 1 else 0

    @property
    def parameters(self) -> int:
        layers = self.layers * (self.layer_without_experts + self.experts_of_layer)
        return layers + self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def cost(self) -> CostModel:
        width = self.active * self.ffn
        return CostModel(self.layers, self.hidden, width, self.heads, self.kv_heads, self.head_dim, self.vocab)

    def read_to_decode(self, rows: float) -> float:
        """Parameters that one step of ``rows`` rows reads: of the experts those that some row chose."""
        unread = (1 - self.active / self.experts) ** rows * self.experts_of_layer
        return self.parameters - self.layers * unread

    @classmethod
    def of_hf(cls, folder: str) -> "Architecture":
        """Of a Hugging Face folder. Raises UserError for one that is not read here."""
        config = architecture(folder)
        experts = config.get("num_experts", 1)
        if config.get("moe_layer_freq", 1) != 1:
            raise UserError(f"--hf-model {folder} has dense layers among those with experts: no forecast knows these")
        heads, kv_heads, head_dim = config["num_attention_heads"], config["num_query_groups"], config["kv_channels"]
        biases = (heads + 2 * kv_heads) * head_dim if config["add_qkv_bias"] else 0
        return cls(
            config["num_layers"],
            config["hidden_size"],
            config["ffn_hidden_size"] if experts == 1 else config["moe_ffn_hidden_size"],
            heads,
            kv_heads,
            head_dim,
            config["vocab_size"],
            tied=not config["untie_embeddings_and_output_weights"],
            extra_per_layer=biases + (2 * head_dim if config["qk_layernorm"] else 0),
            experts=experts,
            active=config.get("moe_router_topk", 1),
        )


MODELS = {
    "qwen2.5-32b": Architecture(64, 5120, 27648, 40, 8, 128, 152064, extra_per_layer=7168),
    "qwen2.5-7b": Architecture(28, 3584, 18944, 28, 4, 128, 152064, extra_per_layer=4608),
    "qwen3-32b": Architecture(64, 5120, 25600, 64, 8, 128, 151936, extra_per_layer=256),
    "qwen3-4b": Architecture(36, 2560, 9728, 32, 8, 128, 151936, tied=True, extra_per_layer=256),
    "qwen3-8b": Architecture(36, 4096, 12288, 32, 8, 128, 151936, extra_per_layer=256),
    "qwen3-30b-a3b": Architecture(48, 2048, 768, 32, 4, 128, 151936, extra_per_layer=256, experts=128, active=8),
}
PRESET_MODELS = {"fipo-32b": "qwen2.5-32b", "dapo": "qwen2.5-32b", "fipo-7b": "qwen2.5-7b"}
PRESET_TENSOR_SIZES = {"fipo-32b": 8, "dapo": 8, "fipo-7b": 2}
"""As in the scripts of examples/."""


FULL, NONE = "activations, full recompute", "activations, no recompute"
LOG_PROBS = "log-probs (tiles, gathered hidden states, weight gradient)"
KV, KV_ROW = "keys and values, all rows at the limit", "keys and values, a row at the limit"


@dataclass(frozen=True)
class Layout:
    """Ranks along each dimension; data: replicas. ``expert`` of a stage's ranks share a layer's experts."""

    tensor: int
    pipeline: int
    context: int
    data: int
    expert: int


def memory(
    model: Architecture, layout: Layout, batch: dict[str, int], running: int
) -> tuple[dict[str, float], dict[str, float]]:
    """(what stays, what comes and goes): GB on the fullest GPU by what it is for."""
    t, embedding = layout.tensor, model.vocab * model.hidden
    own_layers = math.ceil(model.layers / layout.pipeline)
    ends = 2 if layout.pipeline == 1 and not model.tied else 1  # embedding and output weight on the fullest stage
    own = (own_layers * model.layer_without_experts + ends * embedding) / t
    own_experts = own_layers * model.experts_of_layer / layout.expert
    copies = layout.data * layout.context, t * layout.data * layout.context / layout.expert  # of own, of own_experts
    tokens = max(batch["max_tokens_per_microbatch"], batch["longest"]) / layout.context
    layer = tokens * activation_bytes(model) / t
    layer_input = tokens * 2 * model.hidden / t
    row = kv_bytes(own_layers, max(1, model.kv_heads // t), model.head_dim, batch["longest"])
    stays = {
        "weights (bf16)": 2 * (own + own_experts),
        "gradients (fp32)": 4 * (own + own_experts),
        "optimizer (fp32 weights and moments, sharded)": 12 * (own / copies[0] + own_experts / copies[1]),
    }
    comes = {
        # the first of p stages holds p micro-batches of layers / p layers each
        FULL: model.layers * layer_input + layer,
        NONE: model.layers * layer,
        LOG_PROBS: 3 * TILE_BYTES + 2 * tokens * 2 * model.hidden + 4 * embedding / t,
        KV: running * row,
        KV_ROW: row,
    }
    return {name: value / GB for name, value in stays.items()}, {name: value / GB for name, value in comes.items()}


def activation_bytes(model: Architecture) -> int:
    """Bytes of one layer's bf16 activations for one token: two norms with input and output, q k v and attention's
    result, gate, up and their product; for experts also the copies of the token that go to and come from them."""
    attention = 2 * model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    copies = 4 * model.active * model.hidden if model.experts > 1 else 0
    return 8 * model.hidden + attention + 6 * model.active * model.ffn + copies


@dataclass(frozen=True)
class Assumptions:
    """mfu: share of the peak that training's operations reach, recomputation not counted. bandwidth: share of the
    memory bandwidth that decoding reaches. layer_ms: what a layer takes to decode at least, launched from Python.
    response, prompt: mean tokens. contrast: share of the generated groups that training takes. reserve: GB for the
    CUDA context, NCCL and fragmentation."""

    mfu: float
    bandwidth: float
    layer_ms: float
    response: int
    prompt: int
    contrast: float
    reserve: float


def seconds(
    model: Architecture, layout: Layout, gpu: str, batch: dict[str, int], running: int, assume: Assumptions
) -> dict[str, float]:
    """Seconds of a step's phases. Every sequence counts as one of mean length."""
    gpus = layout.tensor * layout.pipeline * layout.context * layout.data
    forward = batch["samples_per_step"] * model.cost.sequence(assume.prompt + assume.response)
    peak = peak_flops(gpu, "bf16")
    assert peak is not None, "every GPU of the table has one"
    rate = gpus * peak * assume.mfu
    micro_batches = batch["samples_per_update"] / layout.data * (assume.prompt + assume.response)
    micro_batches = max(1.0, micro_batches / batch["max_tokens_per_microbatch"])
    bubble = 1 + (layout.pipeline - 1) / micro_batches
    rows = batch["samples_per_step"] / assume.contrast / (layout.data * layout.context)
    at_once = min(running, rows)
    kv_row = kv_bytes(model.layers, model.kv_heads, model.head_dim, 1) * (assume.prompt + assume.response / 2)
    read = 2 * model.read_to_decode(at_once) + at_once * kv_row  # by the whole replica, for one token of each row
    step = read / (layout.tensor * GPUS[gpu].bandwidth * 1e12 * assume.bandwidth)
    step = max(step, model.layers * assume.layer_ms / 1e3)
    return {
        # a wave ends with its longest response, and among many rows one reaches the limit
        "rollout (embedded, in waves)": math.ceil(rows / at_once) * batch["max_response_tokens"] * step,
        "old log-probs": forward / rate * bubble,
        "updates": 3 * forward / rate * bubble,
    }


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed. Raises UserError for sizes that do not fit each other."""
    preset = PRESETS[args.preset]
    name = args.model or PRESET_MODELS.get(args.preset)
    if not args.hf_model and not name:
        raise UserError(f"--preset {args.preset} names no model; give --model or --hf-model")
    model = Architecture.of_hf(args.hf_model) if args.hf_model else MODELS[name]
    t = args.tensor_model_parallel_size or PRESET_TENSOR_SIZES.get(args.preset, 1)
    p, c = args.pipeline_model_parallel_size, args.context_parallel_size
    if args.gpus % (t * p * c):
        raise UserError(f"--gpus {args.gpus} is no multiple of tensor x pipeline x context = {t * p * c}")
    if model.heads % t:
        raise UserError(f"--tensor-model-parallel-size {t} does not divide {model.heads} attention heads")
    layout = Layout(t, p, c, args.gpus // (t * p * c), args.expert_model_parallel_size)
    if model.experts % layout.expert or args.gpus // p % layout.expert:
        raise UserError(
            f"--expert-model-parallel-size {layout.expert} does not divide {model.experts} experts and the "
            f"{args.gpus // p} GPUs of a pipeline stage"
        )
    samples, update = preset["grpo_prompts_per_step"] * preset["grpo_group_size"], preset["global_batch_size"]
    if update % layout.data:
        raise UserError(f"{update} samples of an update do not divide over {layout.data} replicas; change --gpus")
    batch = {
        "samples_per_step": samples,
        "samples_per_update": update,
        "updates_per_step": samples // update,
        "samples_per_replica_and_update": update // layout.data,
        "max_prompt_tokens": preset["max_prompt_tokens"],
        "max_response_tokens": preset["rollout_max_tokens"],
        "longest": preset["max_prompt_tokens"] + preset["rollout_max_tokens"],
        "max_tokens_per_microbatch": args.max_tokens_per_microbatch or preset["max_tokens_per_microbatch"],
    }
    response = args.mean_response_tokens or batch["max_response_tokens"] // 2
    assume = Assumptions(
        args.mfu, args.bandwidth, args.layer_ms, response, args.mean_prompt_tokens, args.contrast, args.reserve
    )
    available = GPUS[args.gpu].memory
    stays, comes = memory(model, layout, batch, args.rollout_max_running)
    resident = sum(stays.values()) + assume.reserve
    training = comes[FULL if args.recompute == "full" else NONE] + comes[LOG_PROBS]
    peak = resident + max(training, comes[KV])  # training and generation take turns
    time = seconds(model, layout, args.gpu, batch, args.rollout_max_running, assume)
    return {
        "model": args.hf_model or name,
        "parameters": model.parameters,
        "layout": asdict(layout),
        "batch": batch,
        "assumptions": asdict(assume),
        "memory_gb": stays | comes | {"reserve": assume.reserve, "peak": peak, "there is": available},
        "rows_that_fit": max(0, int((available - resident) / comes[KV_ROW])),
        "seconds_per_step": time | {"step": sum(time.values())},
        "trained_tokens_per_second": samples * response / sum(time.values()),
        "fits": peak <= available,
    }


def show(result: dict[str, Any]) -> str:
    """The same for a person."""
    lines = [f"{result['model']}: {result['parameters'] / 1e9:.2f} B parameters"]
    lines.append("layout: " + ", ".join(f"{name} {size}" for name, size in result["layout"].items()))
    lines += [f"  {name.replace('_', ' '):62}{value:>10,}" for name, value in result["batch"].items()]
    lines.append("memory of the fullest GPU, GB")
    lines += [f"  {name:62}{value:>10.1f}" for name, value in result["memory_gb"].items()]
    verdict = "fits" if result["fits"] else "DOES NOT FIT"
    lines.append(f"  {verdict}; {result['rows_that_fit']} rows of full length could generate at once")
    lines.append("a step, seconds")
    lines += [f"  {name:62}{value:>10,.0f}" for name, value in result["seconds_per_step"].items()]
    lines.append(f"  {'response tokens trained per second':62}{result['trained_tokens_per_second']:>10,.0f}")
    assumed = ", ".join(f"{name} {value:g}" for name, value in result["assumptions"].items())
    return "\n".join([*lines, f"an estimate, assuming: {assumed}"])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="fipo-32b")
    parser.add_argument("--model", choices=sorted(MODELS), help="a known architecture; default: the preset's")
    parser.add_argument("--hf-model", metavar="DIR", help="the architecture of a Hugging Face folder")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--gpu", type=str.upper, choices=sorted(GPUS), default="H100")
    parser.add_argument("--tensor-model-parallel-size", type=int, help="default: that of the preset's script")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--context-parallel-size", type=int, default=1)
    parser.add_argument("--expert-model-parallel-size", type=int, default=1)
    parser.add_argument("--max-tokens-per-microbatch", type=int, help="default: the preset's")
    parser.add_argument("--rollout-max-running", type=int, default=48, help="rows that a replica generates at once")
    parser.add_argument("--recompute", choices=["full", "none"], default="full")
    parser.add_argument("--mean-response-tokens", type=int, help="default: half of the limit, as late in training")
    parser.add_argument("--mean-prompt-tokens", type=int, default=200)
    parser.add_argument("--mfu", type=float, default=0.35)
    parser.add_argument("--bandwidth", type=float, default=0.5)
    parser.add_argument("--layer-ms", type=float, default=0.2)
    parser.add_argument("--contrast", type=float, default=0.6)
    parser.add_argument("--reserve", type=float, default=5.0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    args = parser.parse_args(argv)
    try:
        result = plan(args)
    except UserError as error:
        print(f"plan_run: {error}", file=sys.stderr)
        return 2
    print(show(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["fits"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
