"""python -m megatron_fipo.data check FILE ...: every row that training would refuse, with file, row and reason."""

import argparse
import functools
import sys
from collections.abc import Sequence

from megatron_fipo.data.check import DataCheck
from megatron_fipo.data.layouts import Encode, Keys
from megatron_fipo.errors import UserError
from megatron_fipo.rewards.verify import RULES, resolve_source

_SHOWN = 100


def _encoder(hf_model: str, chat_template: bool | None) -> Encode:
    from megatron_fipo.data.encoding import encoder, load_tokenizer  # seconds, for transformers

    return encoder(load_tokenizer(hf_model), chat_template)


def main(argv: Sequence[str]) -> int:
    """Exit code: 0, 1 if a row is wrong, 2 for a mistake on the command line."""
    parser = argparse.ArgumentParser(prog="megatron_fipo.data", description=__doc__, allow_abbrev=False)
    check = parser.add_subparsers(required=True).add_parser("check", help="read the data as training would")
    check.add_argument("data", nargs="+", metavar="PATH", help="as --prompt-data takes it")
    check.add_argument("--prompt-key", metavar="COLUMN")
    check.add_argument("--answer-key", metavar="COLUMN")
    check.add_argument("--reward-default-rule", choices=sorted(RULES))
    check.add_argument("--hf-model", metavar="DIR", help="count prompts that are too long for --max-prompt-tokens, too")
    check.add_argument("--max-prompt-tokens", type=int, default=2048)
    check.add_argument("--apply-chat-template", action=argparse.BooleanOptionalAction)
    args = parser.parse_args(argv)
    try:
        encode = _encoder(args.hf_model, args.apply_chat_template) if args.hf_model else None
        findings = DataCheck(
            Keys(args.prompt_key, args.answer_key),
            functools.partial(resolve_source, default_rule=args.reward_default_rule),
            encode,
            args.max_prompt_tokens,
        )
        for spec in args.data:
            findings.read(spec)
    except UserError as error:
        print(f"megatron_fipo: {error}", file=sys.stderr)
        return 2
    for problem in findings.problems[:_SHOWN]:
        print(problem)
    if len(findings.problems) > _SHOWN:
        print(f"... and {len(findings.problems) - _SHOWN:,} more")
    notes = f"{findings.rows:,} rows, {len(findings.problems):,} wrong, {findings.duplicates:,} duplicates"
    print(notes + (f", {findings.too_long:,} longer than {args.max_prompt_tokens:,} tokens" if encode else ""))
    for source, count in findings.sources.most_common(_SHOWN):
        print(f"  {count:>9,}  {source}")
    return 1 if findings.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
