"""Megatron-core 0.19.2 without TransformerEngine and Apex, on any device: the distributed optimizer over torch's Adam.

Three places in the distributed optimizer's checkpoint code assume the fused optimizers' state layout.
"""

import functools
from typing import Any

import torch

from megatron_fipo.compat.patching import Patch


def is_needed() -> bool:
    """True if Megatron's distributed optimizer runs on torch.optim."""
    from megatron.core.optimizer import distrib_optimizer

    return not distrib_optimizer.HAVE_APEX_OR_TE


def _state_dict(original: Any) -> Any:
    @functools.wraps(original)
    def state_dict(self: Any) -> Any:
        if not self.optimizer.state:
            self.init_state_fn(self.optimizer, self.config)
        for state in self.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))
        return original(self)

    return state_dict


def _load_state_dict(original: Any) -> Any:
    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Any) -> Any:
        result = original(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()
        return result

    return load_state_dict


def _set_main_param_and_optimizer_states(_original: Any) -> Any:
    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, index = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][index]
        main_param.data.copy_(tensors["param"])
        for name, value in self.optimizer.state[main_param].items():
            if name != "step":
                value.copy_(tensors[name])

    return set_states


_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"
PATCHES = (
    Patch(
        _OPTIMIZER,
        "DistributedOptimizer.state_dict",
        "it asserts that torch's Adam has a state, which fails when a checkpoint is loaded before the first step",
        _state_dict,
    ),
    Patch(
        _OPTIMIZER,
        "DistributedOptimizer.load_state_dict",
        "it gives all parameters one shared `step` tensor, which Adam then advances once per parameter",
        _load_state_dict,
    ),
    Patch(
        _OPTIMIZER,
        "DistributedOptimizer._set_main_param_and_optimizer_states",
        "it copies `step`, which sharded checkpoint formats do not carry",
        _set_main_param_and_optimizer_states,
    ),
)
PATCHED = tuple((patch.module, patch.symbol) for patch in PATCHES)
