"""Hugging Face weights in and out under every layout: one launch of four processes."""

import os
import subprocess
import sys
from pathlib import Path

CASES = 27


def test_every_layout_streams_the_folder_and_computes_what_one_process_does(hf_model, tmp_path):
    settings = {"num_hidden_layers": 4}
    folders = {
        "llama": hf_model("llama", tied=True, **settings)[0],
        "qwen2": hf_model("qwen2", tied=True, **settings)[0],
        "qwen3": hf_model("qwen3", tied=False, **settings)[0],
        "qwen3_moe": hf_model("qwen3_moe", tied=False, **settings)[0],
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command += [str(Path(__file__).with_name("hf_layouts_worker.py")), str(tmp_path)]
    command += [f"{family}={folder}" for family, folder in folders.items()]
    tests = Path(__file__).parents[1]
    path = os.pathsep.join(map(str, (tests.parent, tests, tests / "unit")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": path}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert process.returncode == 0, process.stderr[-6000:]
    assert process.stdout.count("agrees: ") == CASES, process.stdout
