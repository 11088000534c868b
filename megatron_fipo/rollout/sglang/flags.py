"""`--sglang-FLAG VALUE...` on the trainer's command line is `--FLAG VALUE...` on the servers'."""

from collections.abc import Sequence

from megatron_fipo.errors import UserError

OLDEST_VERSION = "0.5.11"
"""Up to 0.5.10 SGLang runs pickled code that reaches its sockets (CVE-2026-3059, -3060, -7301, -7304)."""

PREFIX = "--sglang-"
OURS = ("--sglang-servers", "--sglang-url", "--sglang-host", "--sglang-port", "--sglang-colocate")
"""Flags with this prefix that the trainer itself understands."""

DESCRIBING = ("--model-path", "--load-format", "--quantization")
"""Servers' flags that the trainer must know of servers that it did not start: they say in what numbers weights go."""

_REFUSED = {
    "model": "use --sglang-model-path",
    "api-key": "every run makes keys of its own",
    "admin-api-key": "every run makes keys of its own",
    "config": "give its flags here",
    "weight-version": "the trainer numbers the weights",
    "preferred-sampling-params": "use the --rollout-* flags",
    "enable-custom-logit-processor": "it lets requests run code, and log-probs would not be the policy's",
    "nnodes": "start servers that span nodes yourself and give --sglang-url",
}


def tensor_parallel_size(flags: Sequence[str]) -> int:
    """Of a server with these flags."""
    names = ("--tp", "--tp-size", "--tensor-parallel-size")
    return next((int(value) for flag, value in zip(flags, flags[1:], strict=False) if flag in names), 1)


def split_flags(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """(the trainer's words, the servers' flags without the prefix).

    A flag takes the words up to the next flag. Raises UserError for a flag that cannot be passed on.
    """
    trainer: list[str] = []
    servers: list[str] = []
    words = trainer
    for word in argv:
        name, _, value = word.partition("=")
        if word.startswith(PREFIX) and name not in OURS:
            flag = name[len(PREFIX) :]
            if flag in _REFUSED:
                raise UserError(f"{name} is not passed on: {_REFUSED[flag]}")
            words = servers
            servers += [f"--{flag}", value] if value else [f"--{flag}"]
            continue
        if word.startswith("--"):
            words = trainer
        words.append(word)
    return trainer, tuple(servers)
