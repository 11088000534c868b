"""Seeds of completions: functions of what is generated, so no generator state has to be saved or shared."""

import hashlib


def completion_seed(run_seed: int, purpose: str, visit: int, sample: int) -> int:
    """63-bit seed of one completion.

    ``purpose`` separates training from each evaluation, ``visit`` numbers the prompt within it, ``sample`` the
    completions of that prompt.
    """
    name = f"{run_seed}/{purpose}/{visit}/{sample}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1
