"""Log-probs without full logits under tensor, sequence, data and pipeline parallelism: one launch of two processes."""

import os
import subprocess
import sys
from pathlib import Path

CASES = 17


def test_every_layout_agrees_with_one_process(hf_model):
    folders = [hf_model("qwen2", tied=tied, vocab_size=300)[0] for tied in (True, False)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).with_name("logprob_worker.py")), *map(str, folders)]
    tests = Path(__file__).parents[1]
    path = os.pathsep.join(map(str, (tests.parent, tests, tests / "unit")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": path}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr[-6000:]
    assert process.stdout.count("agrees: ") == CASES, process.stdout
