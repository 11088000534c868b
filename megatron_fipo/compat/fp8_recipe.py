"""Megatron-core 0.19.2 with TransformerEngine: FP8 recipes that can have a backward pass in higher precision."""

import functools
from typing import Any

from megatron_fipo.compat.patching import Patch
from megatron_fipo.errors import UserError

OVERRIDE = "fp8_backward_override"
"""Attribute of a TransformerConfig: the recipe's `backward_override`. Without it recipes stay as they are."""


def is_needed() -> bool:
    """True if Megatron makes FP8 recipes."""
    from megatron.core import fp8_utils

    return fp8_utils.HAVE_TE


def _get_fp8_recipe(original: Any) -> Any:
    @functools.wraps(original)
    def get_fp8_recipe(config: Any) -> Any:
        recipe = original(config)
        if hasattr(config, OVERRIDE):
            if not hasattr(recipe, "backward_override"):  # an attribute that nobody reads would change nothing
                raise UserError(
                    "--fp8-backward: this TransformerEngine's recipes have no backward_override; use 2.20 or newer, or "
                    "leave the flag out"
                )
            recipe.backward_override = getattr(config, OVERRIDE)
        return recipe

    return get_fp8_recipe


PATCHES = (
    Patch(
        "megatron.core.fp8_utils",
        "get_fp8_recipe",
        "it leaves a recipe's backward_override to an environment variable, read when TransformerEngine is imported",
        _get_fp8_recipe,
    ),
)
