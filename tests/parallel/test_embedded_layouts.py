"""The embedded engine gives the single process's tokens in every layout: one launch of four processes."""

import os
import subprocess
import sys
from pathlib import Path

CASES = 19


def test_every_layout_generates_what_one_process_does(hf_model):
    folders = [hf_model(family, tied=family == "qwen2")[0] for family in ("qwen2", "qwen3", "qwen3_moe")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command += [str(Path(__file__).with_name("embedded_layouts_worker.py")), *map(str, folders)]
    tests = Path(__file__).parents[1]
    path = os.pathsep.join(map(str, (tests.parent, tests)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": path}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-6000:]
    assert process.stdout.count("agrees: ") == CASES, process.stdout
