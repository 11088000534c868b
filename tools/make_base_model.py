"""Make the quickstart's base model, a tiny Qwen3 that imitates error-prone worked sums, and problems to train it on.

    python tools/make_base_model.py --out DIR --seed 1

The task is reasoning-gym's chain_sum with four or five one-digit terms, written bare, and solved step by step in
reasoning-gym's answer convention:

    7+1-3-2=   ->   7+1=8;8-3=5;5-2=3<answer>3</answer>

The solutions that the model imitates are bad on purpose: each step is wrong by one or two with probability
`step_error`, and a share `direct` is a bare answer without steps. Imitation copies that; mending it is left to RL.

DIR becomes an ordinary Hugging Face folder that also holds train.jsonl and heldout.jsonl. It appears whole or not at
all, and is kept if it was made with the same settings before. Runs on one CPU thread whatever the machine has: the
number of threads changes the rounding, and this way a seed gives the same model with and without a GPU.
"""

import argparse
import dataclasses
import hashlib
import json
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import reasoning_gym
import torch
from answer_styles import answer_styles, table_row
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_fipo.data.prompts import read_prompts
from megatron_fipo.errors import UserError

TASK = "chain_sum"
PAD, EOS = "<pad>", "<eos>"
ANSWER_TAGS = ("<answer>", "</answer>")
VOCABULARY = (PAD, EOS, *ANSWER_TAGS, *"0123456789+-=;")
THREADS = 1
SETTINGS_FILE = "base_model.json"
# reasoning-gym makes problem i of a data set from random.Random(seed + i), so "another seed" alone is the same
# problems shifted by one. Each part gets a range of seed + i of its own.
PARTS = ("heldout", "train", "warmup")
PART_RANGE = 1_000_000


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides what the folder holds; `digest` is the cache key."""

    seed: int = 1
    terms: tuple[int, int] = (4, 5)
    step_error: float = 0.15
    direct: float = 0.15
    hidden_size: int = 64
    layers: int = 2
    iterations: int = 800
    batch_size: int = 128
    learning_rate: float = 4e-3
    heldout: int = 1_024
    train: int = 20_000
    warmup: int = 50_000
    version: int = 2  # raise when the code below makes something else of the same settings

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()[:16]


def make_problems(settings: Settings) -> dict[str, list[dict]]:
    """The rows of each part. No prompt occurs twice, neither within a part nor in two of them."""
    seen: set[str] = set()
    problems: dict[str, list[dict]] = {}
    for number, part in enumerate(PARTS):
        dataset = reasoning_gym.create_dataset(
            TASK,
            min_terms=settings.terms[0],
            max_terms=settings.terms[1],
            min_digits=1,
            max_digits=1,
            seed=(settings.seed * len(PARTS) + number) * PART_RANGE,
            size=PART_RANGE,
        )
        rows = problems[part] = []
        for entry in dataset:
            prompt = entry["metadata"]["expression"].replace(" ", "") + "="
            if prompt not in seen:
                seen.add(prompt)
                rows.append(
                    {
                        "prompt": prompt,
                        "answer": entry["answer"],
                        "source": f"reasoning_gym/{TASK}",
                        "metadata": entry["metadata"],
                    }
                )
            if len(rows) == getattr(settings, part):
                break
        else:
            raise UserError(
                f"{settings.terms} terms do not give {getattr(settings, part)} distinct problems; ask for fewer"
            )
    return problems


def noisy_solution(row: dict, settings: Settings, rng: random.Random) -> str:
    """A solution to imitate. After a wrong step it goes on from the wrong value, as a person would."""
    if rng.random() < settings.direct:
        return f"<answer>{row['answer']}</answer>{EOS}"
    first, *rest = re.findall(r"[+-]?\d+", row["prompt"])
    value = int(first)
    steps = []
    for term in rest:
        result = value + int(term)
        if rng.random() < settings.step_error:
            result += rng.choice((-2, -1, 1, 2))
        steps.append(f"{value}{term}={result}")
        value = result
    return f"{';'.join(steps)}<answer>{value}</answer>{EOS}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and the tags. A character outside the vocabulary is an error, not a silent <unk>."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    # Not special: decoding without special tokens must keep the tags, or no answer would be found.
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in ANSWER_TAGS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left")


def make_model(settings: Settings) -> Qwen3ForCausalLM:
    """The untrained model."""
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=settings.hidden_size // 4,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        # No pad_token_id: transformers would zero that token's embedding, and the first sample to contain the token
        # (they do, one in 100,000) would send a thousandfold gradient through the RMSNorm of a zero vector.
        eos_token_id=VOCABULARY.index(EOS),
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, pad_token_id=VOCABULARY.index(PAD), eos_token_id=config.eos_token_id
    )
    return model


def encode_solutions(
    rows: list[dict], tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> tuple[torch.Tensor, ...]:
    """Right-padded (ids_BL, labels_BL), int64; labels are shifted, -100 where nothing is learned (prompt, padding)."""
    rng = random.Random(settings.seed)
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    solutions = tokenizer([noisy_solution(row, settings, rng) for row in rows])["input_ids"]
    width = max(len(p) + len(s) for p, s in zip(prompts, solutions, strict=True))
    ids_BL = torch.full((len(rows), width), VOCABULARY.index(PAD))
    labels_BL = torch.full((len(rows), width), -100)
    for i, (prompt, solution) in enumerate(zip(prompts, solutions, strict=True)):
        end = len(prompt) + len(solution)
        ids_BL[i, :end] = torch.tensor(prompt + solution)
        labels_BL[i, len(prompt) - 1 : end - 1] = torch.tensor(solution)
    return ids_BL, labels_BL


def imitate(model: Qwen3ForCausalLM, ids_BL: torch.Tensor, labels_BL: torch.Tensor, settings: Settings) -> None:
    """Supervised training on the solutions, in place."""
    rng = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    began = time.monotonic()
    model.train()
    for iteration in range(1, settings.iterations + 1):
        ramp = min(1.0, iteration / 50) * (1 - (iteration - 1) / settings.iterations)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * ramp
        chosen = torch.randint(len(ids_BL), (settings.batch_size,), generator=rng)
        width = int((ids_BL[chosen] != VOCABULARY.index(PAD)).sum(1).max())
        # Padding stands on the right, where causal attention cannot see it: no mask needed.
        logits_BLV = model(input_ids=ids_BL[chosen, :width], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), labels_BL[chosen, :width].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if iteration % 100 == 0 or iteration == settings.iterations:
            seconds = time.monotonic() - began
            print(
                f"base model: iteration {iteration}/{settings.iterations}, loss {loss.item():.4f}, {seconds:.0f} s",
                flush=True,
            )


def write_folder(out: Path, settings: Settings) -> None:
    """Make everything in a temporary folder beside `out`, then put it in place."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(settings.seed)
    problems = make_problems(settings)
    tokenizer = make_tokenizer()
    model = make_model(settings)
    imitate(model, *encode_solutions(problems["warmup"], tokenizer, settings), settings)

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / out.name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for part in ("train", "heldout"):
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems[part]))
        prompts = read_prompts([str(folder / "heldout.jsonl")], lambda text: tokenizer(text)["input_ids"])
        for name in ("sampled", "greedy"):
            styles = answer_styles(model, tokenizer, prompts, sampled=name == "sampled")
            print(f"base model, held-out, {name}: {table_row(styles)}", flush=True)
        record = {"digest": settings.digest, "settings": dataclasses.asdict(settings)}
        (folder / SETTINGS_FILE).write_text(json.dumps(record, indent=2) + "\n")
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)


def is_current(out: Path, settings: Settings) -> bool:
    """Whether `out` holds what `settings` make. Raises UserError if it holds something that this tool did not make."""
    record = out / SETTINGS_FILE
    if record.is_file():
        return json.loads(record.read_text())["digest"] == settings.digest
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists and was not made by this tool; name a new or an empty folder.")
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--seed", type=int, default=Settings.seed, help="decides model and problems (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.seed < 0:
        raise UserError(
            f"--seed {args.seed}: reasoning-gym takes a negative seed for its absolute value; use 0 or more."
        )
    settings = Settings(seed=args.seed)
    if is_current(args.out, settings):
        print(f"base model: {args.out} is up to date (settings {settings.digest})")
    else:
        write_folder(args.out, settings)
        print(f"base model: wrote {args.out}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
