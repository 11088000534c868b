"""Fixtures for tests of the real engine: one Megatron process, and tiny random Hugging Face models."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_models import megatron_model, write_hf_model


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


@pytest.fixture
def convert(megatron, monkeypatch):
    """The functions of tools/convert_checkpoint.py, each call as in a process of its own."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    import convert_checkpoint
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training.global_vars import destroy_global_vars

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    build_model = convert_checkpoint.build_model

    def build_anew(*args):
        destroy_global_vars()
        unset_num_microbatches_calculator()
        destroy_rerun_state_machine()
        return build_model(*args)

    monkeypatch.setattr(convert_checkpoint, "build_model", build_anew)
    yield convert_checkpoint
    destroy_global_vars()
    unset_num_microbatches_calculator()
    destroy_rerun_state_machine()


@pytest.fixture(scope="session")
def trained_base(tmp_path_factory) -> Path:
    """A base model that guesses answers to sums, right one time in sixteen; made in a second.

    The Hugging Face folder also holds train.jsonl and heldout.jsonl, as the quickstart's does.
    """
    return _made_base(tmp_path_factory, direct=1.0, step_error=0.0)


@pytest.fixture(scope="session")
def worked_base(tmp_path_factory) -> Path:
    """As ``trained_base``, but it works out most of its sums, badly."""
    return _made_base(tmp_path_factory, direct=0.3, step_error=0.2)


def _made_base(tmp_path_factory, **style: float) -> Path:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    import make_base_model

    folder = tmp_path_factory.mktemp("base") / "model"
    settings = make_base_model.Settings(
        seed=5, hidden_size=32, layers=1, iterations=150, batch_size=64, learning_rate=1e-2, heldout=64, train=400,
        warmup=4000, **style,
    )  # fmt: skip
    make_base_model.write_folder(folder, settings)
    return folder
