"""Seeds of completions: functions of what is generated, so no generator state has to be saved or shared."""

import hashlib


def completion_seed(run_seed: int, purpose: str, visit: int, sample: int) -> int:
    """63-bit seed of one completion.

    ``purpose`` separates training from each evaluation, ``visit`` numbers the prompt within it, ``sample`` the
    completions of that prompt.
    """
    return _hashed(f"{run_seed}/{purpose}/{visit}/{sample}")


def turn_seed(seed: int, number: int) -> int:
    """63-bit seed with which an engine is asked for the ``number``-th time to continue a response of ``seed``.

    The first time it is ``seed``: a response of one turn does not depend on whether there could have been more.
    """
    return _hashed(f"{seed}/{number}") if number else seed


def _hashed(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1
