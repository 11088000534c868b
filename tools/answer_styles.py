"""How a quickstart model answers: share of worked answers, and how often worked and bare ones are right.

    python tools/answer_styles.py MODEL_DIR --problems BASE_DIR/heldout.jsonl

MODEL_DIR is a Hugging Face folder: the base model, or a trained one written with --save-hf. Run it on both to see how
much of a gain in accuracy is style (showing the work) and how much is fewer wrong steps.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from megatron_fipo.data.prompts import Prompt, read_prompts
from megatron_fipo.rewards.response import Response
from megatron_fipo.rewards.verify import score

MAX_TOKENS = 64


@torch.no_grad()
def answer_styles(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt], *, sampled: bool, seed: int = 0
) -> dict[str, float]:
    """One response to each prompt, at temperature 1 or greedy. Shares are fractions, `tokens` the mean response length.

    An answer is worked if it shows at least one step, that is an equals sign.
    """
    torch.manual_seed(seed)
    model.eval()
    right: list[bool] = []
    worked: list[bool] = []
    lengths: list[int] = []
    # Prompts of one length make a batch without padding.
    for length, group in itertools.groupby(sorted(prompts, key=lambda p: len(p.tokens)), key=lambda p: len(p.tokens)):
        batch = list(group)
        ids_BL = torch.tensor([prompt.tokens for prompt in batch])
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {"do_sample": False}
        out_BL = model.generate(
            input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL), max_new_tokens=MAX_TOKENS, **options
        )
        for prompt, tokens in zip(batch, out_BL[:, length:], strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            right.append(score(Response("", text, prompt.answer, prompt.source, prompt.metadata)) >= 1.0)
            worked.append("=" in text)
            lengths.append(int((tokens != tokenizer.pad_token_id).sum()))
    right_worked = sum(r and w for r, w in zip(right, worked, strict=True))
    return {
        "accuracy": sum(right) / len(right),
        "worked": sum(worked) / len(worked),
        "accuracy_worked": right_worked / max(sum(worked), 1),
        "accuracy_bare": (sum(right) - right_worked) / max(len(worked) - sum(worked), 1),
        "tokens": sum(lengths) / len(lengths),
    }


def table_row(styles: dict[str, float]) -> str:
    """One line for people."""
    return (
        f"{styles['accuracy']:.1%} right, {styles['worked']:.1%} worked, {styles['accuracy_worked']:.1%} of these right"
        f", {styles['accuracy_bare']:.1%} of the bare ones right, {styles['tokens']:.1f} tokens"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("--problems", required=True, help="JSONL file with prompts and answers")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = read_prompts([args.problems], lambda text: tokenizer(text)["input_ids"])
    rows = {name: answer_styles(model, tokenizer, prompts, sampled=name == "sampled") for name in ("sampled", "greedy")}
    for name, styles in rows.items():
        print(f"{name:8}{table_row(styles)}")
    if args.json:
        args.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
