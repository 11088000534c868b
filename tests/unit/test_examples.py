"""The scripts that start big runs: numbers by --dry-run, shell by shellcheck, the Slurm job by its signals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from megatron_fipo import compat
from megatron_fipo.rollout.sglang import launch
from megatron_fipo.train import main

compat.install()

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.sh"))
SERVERS = {"SGLANG_URLS": "http://a:30000 http://b:30000"}
SBATCH = EXAMPLES / "slurm" / "train.sbatch"

QWEN_32B = {
    "num_hidden_layers": 64, "hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40,
    "num_key_value_heads": 8, "rope_theta": 1e6, "max_position_embeddings": 131072,
}  # fmt: skip
QWEN_MATH_7B = {
    "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
    "num_key_value_heads": 4, "rope_theta": 1e4, "max_position_embeddings": 4096,
}  # fmt: skip
QWEN3 = {"model_type": "qwen3", "head_dim": 128, "vocab_size": 151936, "rope_theta": 1e6}
QWEN3 |= {"num_attention_heads": 32, "max_position_embeddings": 32768}
QWEN3_4B = QWEN3 | {
    "num_hidden_layers": 36, "hidden_size": 2560, "intermediate_size": 9728, "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_30B_A3B = QWEN3 | {
    "model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048, "intermediate_size": 6144,
    "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}  # fmt: skip
QWEN3_RECIPE = {
    "preset": "fipo-32b", "loss": "fipo", "fipo_weight_range": [1.0, 1.2], "clip_range": [0.2, 0.28],
    "group_size": 16, "updates_per_step": 8, "max_response_tokens": 16384, "overlong_buffer": 4096, "lr": 1e-6,
}  # fmt: skip
# The recipes of arXiv 2603.19835: its scripts for 32B, Table 3 for 7B, and the baseline. Then ours for newer models.
RECIPES = {
    "fipo_qwen2.5_32b.sh": (QWEN_32B, {
        "preset": "fipo-32b", "loss": "fipo", "fipo_semantics": "official", "fipo_half_life": 32.0,
        "fipo_weight_range": [1.0, 1.2], "fipo_safety_threshold": 10.0, "fipo_dual_clip": 10.0,
        "clip_range": [0.2, 0.28], "prompts_per_step": 512, "group_size": 16, "samples_per_step": 8192,
        "prompts_per_update": 64, "samples_per_update": 1024, "updates_per_step": 8, "max_prompt_tokens": 2048,
        "max_response_tokens": 20480, "overlong_buffer": 4096, "overlong_penalty": 1.0, "temperature": 1.0,
        "lr": 1e-6, "lr_warmup_steps": 10, "weight_decay": 0.1, "clip_grad": 1.0,
        "world_size": 128, "tensor_parallel": 8, "data_parallel": 16,
    }),
    "fipo_qwen2.5_7b_math.sh": (QWEN_MATH_7B, {
        "preset": "fipo-7b", "loss": "fipo", "fipo_semantics": "official", "fipo_half_life": 32.0,
        "fipo_weight_range": [0.8, 1.2], "fipo_safety_threshold": 3.0, "fipo_dual_clip": 10.0,
        "clip_range": [0.2, 0.28], "prompts_per_step": 512, "group_size": 32, "samples_per_step": 16384,
        "prompts_per_update": 64, "samples_per_update": 2048, "updates_per_step": 8, "max_prompt_tokens": 2048,
        "max_response_tokens": 10240, "overlong_buffer": 2048, "overlong_penalty": 1.0, "temperature": 1.0,
        "lr": 1e-6, "lr_warmup_steps": 10, "weight_decay": 0.1, "clip_grad": 1.0,
        "world_size": 32, "tensor_parallel": 2, "data_parallel": 16,
    }),
    "dapo_qwen2.5_32b.sh": (QWEN_32B, {
        "preset": "dapo", "loss": "dapo", "fipo_weight_range": [1.0, 1.0], "fipo_dual_clip": 10.0,
        "clip_range": [0.2, 0.28], "prompts_per_step": 512, "group_size": 16, "samples_per_step": 8192,
        "prompts_per_update": 32, "samples_per_update": 512, "updates_per_step": 16, "max_prompt_tokens": 2048,
        "max_response_tokens": 20480, "overlong_buffer": 4096, "overlong_penalty": 1.0, "temperature": 1.0,
        "lr": 1e-6, "lr_warmup_steps": 10, "weight_decay": 0.1, "clip_grad": 1.0,
        "world_size": 128, "tensor_parallel": 8, "data_parallel": 16,
    }),
    "fipo_qwen3_4b.sh": (QWEN3_4B, QWEN3_RECIPE | {
        "samples_per_step": 1024, "prompts_per_update": 8,
        "world_size": 8, "tensor_parallel": 1, "data_parallel": 8,
    }),
    "fipo_qwen3_30b_a3b.sh": (QWEN3_30B_A3B, QWEN3_RECIPE | {
        "samples_per_step": 4096, "prompts_per_update": 32,
        "world_size": 32, "tensor_parallel": 4, "data_parallel": 8,
    }),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, trained_base) -> Path:
    """An empty folder to start scripts in, with prompts.jsonl; `python` and `torchrun` are those of the tests."""
    shutil.copy(trained_base / "train.jsonl", tmp_path / "prompts.jsonl")
    return tmp_path


def write_model(folder: Path, architecture: dict, tokenizer_from: Path) -> Path:
    """A Hugging Face folder of the real architecture without a weight in it: --dry-run reads no tensor."""
    folder.mkdir()
    shutil.copy(tokenizer_from / "tokenizer.json", folder)
    shutil.copy(tokenizer_from / "tokenizer_config.json", folder)
    save_file({}, folder / "model.safetensors")
    config = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "vocab_size": 152064, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config | architecture))
    return folder


def run_script(script: Path, folder: Path, *flags: str, first: Path | None = None, **variables: object):
    """Start a script in `folder` with an environment of its own; `first` stands before everything on its PATH."""
    search = [*([str(first)] if first else []), str(Path(sys.executable).parent), os.environ["PATH"]]
    names = ("HOME", "LD_LIBRARY_PATH", "PYTHONPATH")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    environment |= {"PATH": ":".join(search), "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    environment |= {name: str(value) for name, value in variables.items()}
    command = ["bash", str(script), *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def recorded(folder) -> Path:
    """A folder whose `python` and `torchrun` write down what a script starts: the command line is then parsed in this
    process, as importing torch and Megatron again for each script would take most of a minute."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    for name in ("python", "torchrun"):
        (bin_folder / name).write_text(
            f"#!{sys.executable}\nimport json, os, sys\n"
            f"record = {{'command': [{name!r}, *sys.argv[1:]], 'environment': dict(os.environ)}}\n"
            f"open({str(folder / 'started.jsonl')!r}, 'a').write(json.dumps(record) + chr(10))\n"
        )
        (bin_folder / name).chmod(0o755)
    return bin_folder


def started(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "started.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RECIPES)
def test_a_dry_run_has_the_numbers_of_the_recipe(name, folder, recorded, trained_base, monkeypatch, capsys):
    architecture, expected = RECIPES[name]
    model = write_model(folder / "model", architecture, trained_base)
    variables = SERVERS | {"HF_MODEL": model, "PROMPT_DATA": folder / "prompts.jsonl"}
    variables |= {"EVAL_DATA": f"a:{trained_base / 'heldout.jsonl'}:32 b:{trained_base / 'heldout.jsonl'}:4"}
    script = run_script(EXAMPLES / name, folder, "--dry-run", "--num-steps", "77", first=recorded, **variables)
    assert script.returncode == 0, script.stderr
    (start,) = started(folder)
    command, environment = start["command"], start["environment"]
    assert command[:3] == ["python", "-m", "megatron_fipo.train"]
    monkeypatch.setenv("WORLD_SIZE", environment["WORLD_SIZE"])
    monkeypatch.chdir(folder)
    code = main(command[3:])
    out, err = capsys.readouterr()
    assert code == 0, err
    values = json.loads(out)
    assert {key: values[key] for key in expected} == expected
    assert values["num_steps"] == 77 and values["prompts"] == 400 and values["eval_prompts"] == 128
    assert values["pipeline_parallel"] == values["context_parallel"] == 1


def test_one_script_from_shell_to_json(folder, trained_base):
    """The same with nothing recorded."""
    model = write_model(folder / "model", QWEN_MATH_7B, trained_base)
    variables = {"HF_MODEL": model, "PROMPT_DATA": folder / "prompts.jsonl", "NNODES": 1}
    script = run_script(EXAMPLES / "fipo_qwen2.5_7b_math.sh", folder, "--dry-run", **variables)
    assert script.returncode == 0, script.stderr
    assert json.loads(script.stdout)["data_parallel"] == 4


def test_the_launch_names_every_node(folder, recorded):
    variables = {"HF_MODEL": "/models/m", "PROMPT_DATA": "p.jsonl", "NODE_RANK": 3, "MASTER_ADDR": "node0"}
    variables |= {"MASTER_PORT": 12345, "GPUS_PER_NODE": 4, "JOIN_TIMEOUT": 50} | SERVERS
    script = run_script(EXAMPLES / "fipo_qwen2.5_32b.sh", folder, "--seed", "5", first=recorded, **variables)
    assert script.returncode == 0, script.stderr
    wait, torchrun = (start["command"] for start in started(folder))
    assert Path(wait[1]).resolve() == ROOT / "tools" / "wait_for_nodes.py"
    assert " ".join(wait[2:]) == "--nnodes 16 --node-rank 3 --master-addr node0 --port 12346 --timeout 50"
    line = " ".join(torchrun)
    assert line.startswith(
        "torchrun --nnodes 16 --node-rank 3 --nproc-per-node 4 --master-addr node0 --master-port 12345 "
        "--rdzv-conf timeout=50 -m megatron_fipo.train --hf-model /models/m"
    )
    assert line.endswith("--seed 5")


@pytest.mark.parametrize("name", RECIPES)
def test_running_servers_can_generate(name, folder, recorded):
    variables = {"HF_MODEL": "m", "PROMPT_DATA": "p.jsonl", "NNODES": 1, "ROLLOUT_ENGINE": "sglang"}
    script = run_script(EXAMPLES / name, folder, first=recorded, **variables)
    assert script.returncode == 2 and "SGLANG_URLS is not set: " in script.stderr
    assert run_script(EXAMPLES / name, folder, first=recorded, **variables, **SERVERS).returncode == 0
    line = " ".join(started(folder)[-1]["command"])
    assert "--rollout-engine sglang" in line and "--sglang-url http://a:30000 http://b:30000" in line
    assert "--transformer-impl" not in line and "--rollout-max-running" not in line


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_missing_is_named_in_one_line(name, folder):
    both = SERVERS | {"HF_MODEL": "m", "PROMPT_DATA": "p.jsonl"}
    for missing, variables in (
        ("HF_MODEL", {}),
        ("PROMPT_DATA", {"HF_MODEL": "m"}),
        ("MASTER_ADDR", both),
    ):
        script = run_script(EXAMPLES / name, folder, NNODES=2, **variables)
        assert script.returncode == 2 and script.stdout == "" and script.stderr.count("\n") == 1, script.stderr
        assert script.stderr.startswith(f"{name}: {missing} is not set: ")


def test_a_server_has_both_keys_and_what_the_client_needs(folder, recorded):
    keys = {"HF_MODEL": "/m", "SGLANG_API_KEY": "user", "SGLANG_ADMIN_API_KEY": "admin", "HOST": "node16"}
    for missing in ("HF_MODEL", "SGLANG_API_KEY", "SGLANG_ADMIN_API_KEY"):
        script = run_script(EXAMPLES / "sglang_server.sh", folder, **{k: v for k, v in keys.items() if k != missing})
        assert script.returncode == 2 and f"sglang_server.sh: {missing} is not set: " in script.stderr
    script = run_script(EXAMPLES / "sglang_server.sh", folder, "--context-length", "32768", first=recorded, **keys)
    assert script.returncode == 0, script.stderr
    (start,) = started(folder)
    assert " ".join(start["command"]) == (
        "python -m megatron_fipo.rollout.sglang.launch --model-path /m --host node16 --port 30000 --tp-size 8 "
        "--skip-tokenizer-init --incremental-streaming-output --context-length 32768"
    )
    environment = start["environment"]
    assert (environment[launch.API_KEY], environment[launch.ADMIN_KEY]) == ("user", "admin")
    assert environment["PYTHONPATH"].split(":")[0] == str(ROOT)
    assert "PYTORCH_CUDA_ALLOC_CONF" not in environment  # the trainer's


def test_shellcheck_has_nothing_to_say():
    files = [*SCRIPTS, *EXAMPLES.glob("*/*.sh"), *EXAMPLES.glob("*/*.sbatch"), *ROOT.glob("tools/*.sh")]
    assert len(files) >= 6
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "requirements/dev.txt brings it: make env"
    checked = subprocess.run([shellcheck, "--external-sources", *files], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_what_the_slurm_job_asks_for():
    lines = SBATCH.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert all(not line.startswith("#SBATCH") for line in lines[first_command:])  # Slurm stops reading there
    options = dict(re.fullmatch(r"--([a-z-]+)(?:=(\S+))?", directive).groups() for directive in directives)
    assert options["nodes"] == "16" and options["gpus-per-node"] == "8" and options["ntasks-per-node"] == "1"
    assert "requeue" in options and options["open-mode"] == "append"
    # 32B: ten minutes of updates and a checkpoint of 459 GB, both after the signal at the worst.
    assert int(re.fullmatch(r"B:USR1@(\d+)", options["signal"])[1]) >= 2400


# Slurm's two commands. srun (SchedMD/slurm, src/srun/srun.c) passes USR1 on to the task, not to what that starts, and
# answers TERM, HUP and QUIT with KILL for all that the task has started.
SLURM = {
    "scontrol": 'if [[ $1 == show ]]; then echo node7; echo node8; else echo "$*" >>scontrol.log; fi',
    "srun": """
        while [[ $1 == --* ]]; do echo "$1" >>srun.log; shift; done
        [[ $1 == /* ]] || set -- "$ROOT/$1" "${@:2}" # the repository is elsewhere here
        SLURM_NODEID=1 setsid "$@" & task=$!
        trap 'kill -USR1 $task' USR1
        trap 'pkill -KILL --session $task; pkill -KILL --full "$PWD/rank.py"' TERM HUP QUIT
        while wait $task; code=$?; kill -0 $task 2>/dev/null; do :; done
        exit $code""",
}
# A recipe whose torchrun is the real one; its two ranks save as slowly as ranks do.
RANK = r"""
import os, pathlib, signal, sys, time

told = []
signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
os.write(1, b"training\n")  # in one piece beside the other rank's
while not told:
    time.sleep(0.05)
time.sleep(1)
pathlib.Path(f"saved{os.environ['LOCAL_RANK']}").touch()
sys.exit(int(sys.argv[1]))
"""


def start_job(folder: Path, recipe: str, **variables: str) -> subprocess.Popen:
    """train.sbatch with stand-ins for Slurm's two commands, which run the one task here."""
    for name, body in {**SLURM, "recipe": recipe}.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    search = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": search, "SLURM_JOB_ID": "40123", "SLURM_JOB_NUM_NODES": "2", "ROOT": str(ROOT)}
    environment |= {"SLURM_JOB_NODELIST": "node[7-8]", "HF_MODEL": "/m/q", "PROMPT_DATA": "/d/p.jsonl"}
    environment |= variables
    return subprocess.Popen(
        ["bash", str(SBATCH), "recipe", "--seed", "5"],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_a_job_that_ends_by_itself_is_not_started_again(tmp_path):
    job = start_job(tmp_path, 'echo "$NODE_RANK of $NNODES at $MASTER_ADDR:$MASTER_PORT, flags $*"; exit 7')
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 7 and out == "1 of 2 at node7:28246, flags --seed 5\n"
    assert not (tmp_path / "scontrol.log").exists()
    assert "--container" not in (tmp_path / "srun.log").read_text()


def test_a_job_in_a_container_sees_model_data_and_runs(tmp_path):
    eval_data = {"EVAL_DATA": "a:/d/a.jsonl:32 b:/held/out/b.jsonl:4", "CONTAINER_MOUNTS": "/home/me/rewards"}
    runs = {"RUNS_DIR": "../runs", "CONTAINER_IMAGE": "/images/a.sqsh"}
    (tmp_path / "submit").mkdir()
    job = start_job(tmp_path / "submit", 'echo "$RUNS_DIR"', **runs, **eval_data)
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 0 and out == f"{tmp_path}/runs\n"
    options = (tmp_path / "submit" / "srun.log").read_text().splitlines()
    assert "--container-image=/images/a.sqsh" in options
    (mounts,) = (option.split("=")[1].split(",") for option in options if option.startswith("--container-mounts="))
    wanted = {"/m", "/d", "/held/out", "/home/me/rewards", str(tmp_path / "submit"), str(tmp_path / "runs")}
    assert set(mounts) == wanted and len(mounts) == len(wanted)
    assert (tmp_path / "runs").is_dir()  # what is mounted must be there


def test_a_container_is_given_no_relative_path(tmp_path):
    job = start_job(tmp_path, "", CONTAINER_IMAGE="/images/a.sqsh", HF_MODEL="models/q")
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 2 and out == "train.sbatch: a container needs absolute paths, not models\n"


@pytest.mark.parametrize(("code", "requeued"), [(0, True), (3, False)])
def test_a_job_out_of_time_saves_and_goes_back_to_the_queue(tmp_path, code, requeued):
    """Slurm's USR1 to the batch shell reaches every rank and no torchrun; the requeue waits for what they save."""
    (tmp_path / "rank.py").write_text(RANK)
    torchrun = f"exec torchrun --standalone --nproc-per-node 2 {tmp_path}/rank.py {code}"
    job = start_job(tmp_path, torchrun, OMP_NUM_THREADS="1")
    try:
        assert job.stdout is not None and [job.stdout.readline() for _ in range(2)] == 2 * ["training\n"]
        job.send_signal(signal.SIGUSR1)
        out, _ = job.communicate(timeout=60)
    finally:
        subprocess.run(["pkill", "-KILL", "--parent", str(job.pid)])
        subprocess.run(["pkill", "-KILL", "--full", str(tmp_path / "rank.py")])
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists(), out
    assert (tmp_path / "scontrol.log").exists() == requeued == (job.returncode == 0), out
    if requeued:
        assert (tmp_path / "scontrol.log").read_text() == "requeue 40123\n"
