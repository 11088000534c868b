"""Our weight map against Megatron-Bridge's; the cases run in an environment of its own, which `make bridge` makes."""

import os
import subprocess

import pytest
import torch
import transformers
from safetensors.torch import load_file
from side_environment import ROOT, run_cases, side_python


def test_agrees_with_megatron_bridge(tmp_path):
    run_cases("bridge", "bridge/cases.py", tmp_path)


@pytest.mark.long
def test_layouts_interchange(tmp_path):
    """Imported in one layout, exported in another; a vocabulary that the ranks do not divide."""
    python = side_python("bridge")
    config = transformers.MistralConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        vocab_size=93, tie_word_embeddings=True, sliding_window=None,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    for words in (
        ["import", "--hf", tmp_path / "hf", "--out", tmp_path / "megatron", "--tensor-model-parallel-size", 2],
        [
            "export",
            "--megatron",
            tmp_path / "megatron",
            "--out",
            tmp_path / "back",
            "--pipeline-model-parallel-size",
            2,
        ],
    ):
        command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
        command += [ROOT / "tools" / "convert_checkpoint.py", *words, "--bridge", "megatron-bridge"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        process = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=280)
        assert process.returncode == 0, process.stderr[-4000:]
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert expected.keys() == found.keys() and all(torch.equal(found[n], t) for n, t in expected.items())


def test_without_it_the_flag_says_what_to_do(convert, hf_model, tmp_path, capsys):
    source, _ = hf_model("qwen3", tied=True)
    capsys.readouterr()
    argv = ["import", "--hf", source, "--out", tmp_path / "out", "--bridge", "megatron-bridge"]
    assert convert.main(list(map(str, argv))) == 2
    error = capsys.readouterr().err
    assert "make bridge" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
