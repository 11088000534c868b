"""FP8 weight updates: the bytes on the wire are those of the checkpoint, and servers hold what the trainer means."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fleets import INSTALLED, V, fleet_of, make_prompts
from safetensors.torch import load_file, save_file

if not INSTALLED and not os.environ.get("CI"):
    pytest.skip("SGLang is not installed: make sglang", allow_module_level=True)

from test_weight_sync import export_of_model, greedy, perturb, publish  # noqa: E402

from megatron_fipo.quantization.block_fp8 import dequantize  # noqa: E402
from megatron_fipo.rollout.sglang import launch  # noqa: E402
from megatron_fipo.rollout.sglang import servers as servers_module  # noqa: E402
from megatron_fipo.rollout.sglang.fleet import Fleet  # noqa: E402
from megatron_fipo.rollout.sglang.parameters import Checksums, server_parameter  # noqa: E402
from megatron_fipo.rollout.sglang.served import ServedModel  # noqa: E402
from megatron_fipo.rollout.sglang.server import Server, ServerAddress  # noqa: E402
from megatron_fipo.rollout.sglang.servers import StartSettings, start_servers  # noqa: E402
from megatron_fipo.rollout.sglang.update_session import SyncSettings  # noqa: E402
from megatron_fipo.rollout.sglang.weight_sync import WeightSync  # noqa: E402

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

BUCKET = 100_000  # bytes: less than the largest tensors, and a dozen messages
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}
SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2} | HEADS
# SGLang gives every layer experts.
FAMILIES = {"qwen3": SIZES, "qwen3_moe": SIZES | {"moe_intermediate_size": 128, "mlp_only_layers": None}}

SKIPPED = "layers.1.self_attn.o_proj"


@pytest.fixture(scope="module")
def models(hf_model, tmp_path_factory):
    """family -> (bf16 folder, the same in block FP8)."""
    import make_fp8_checkpoint

    folders = {}
    for family, sizes in FAMILIES.items():
        bf16, _ = hf_model(family, tied=False, dtype=torch.bfloat16, **sizes)
        out = tmp_path_factory.mktemp("fp8") / family
        assert make_fp8_checkpoint.main(["--hf", str(bf16), "--out", str(out), "--skip", SKIPPED]) == 0
        folders[family] = bf16, out
    return folders


@pytest.fixture(scope="module")
def trainer(build_model):
    """trainer(bf16 folder) -> chunks in bf16."""
    return lambda folder: [chunk.bfloat16() for chunk in build_model(folder, "--bf16")]


@pytest.fixture(scope="module")
def trainers(models, trainer):
    return {family: trainer(bf16) for family, (bf16, _) in models.items()}


@pytest.fixture(scope="module")
def fp8_servers(models, tmp_path_factory):
    """A server of each family that started from the FP8 folder, in `fp8_server`."""
    logs, keys = tmp_path_factory.mktemp("logs"), {"API_KEY": launch.API_KEY, "ADMIN_KEY": launch.ADMIN_KEY}
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setattr(servers_module, "launch", SimpleNamespace(__name__="fp8_server", **keys))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
        futures = {
            family: pool.submit(start_servers, StartSettings(str(fp8), 1, (), "bfloat16", 1, logs / family))
            for family, (_, fp8) in models.items()
        }
        started = {family: future.result()[0] for family, future in futures.items()}
    yield started
    for server in started.values():
        server.kill()


def sync_of(models, family, chunks, server, **settings) -> tuple[WeightSync, Fleet]:
    bf16, fp8 = models[family]
    served = ServedModel.of(str(bf16), ("--model-path", str(fp8)))
    fleet = fleet_of(server)
    settings = SyncSettings(bucket_bytes=BUCKET, fault_of=lambda info: served.fault(info, None), **settings)
    return WeightSync(export_of_model(chunks, weight_format=served.format), fleet, settings), fleet


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_sent_are_those_of_the_checkpoint(family, models, trainers, tmp_path):
    """Of the trained model's own export, made by the tool; another process rebuilt them with SGLang's bucket class."""
    import make_fp8_checkpoint

    from megatron_fipo.checkpoint.hf_write import save_hf

    bf16, fp8 = models[family]
    chunks = trainers[family]
    perturb(chunks, 1)
    save_hf(chunks, bf16, tmp_path / "bf16")
    words = ["--hf", str(tmp_path / "bf16"), "--out", str(tmp_path / "fp8"), "--skip", SKIPPED]
    assert make_fp8_checkpoint.main(words) == 0
    checkpoint = load_file(tmp_path / "fp8" / "model.safetensors")

    parameters = sorted({server_parameter(name)[0] for name in checkpoint})
    command = [sys.executable, str(Path(__file__).parent / "bucket_receiver.py"), str(tmp_path / "received")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            json.dump(parameters, process.stdin)
            process.stdin.close()
            server = Server("receiver", ServerAddress(f"http://127.0.0.1:{int(process.stdout.readline())}", "", ""))
            sync, fleet = sync_of(models, family, chunks, server)
            publish(sync, fleet, 1)
            sync.close()
        finally:
            process.kill()
    assert fleet.serving() == [server], fleet.reasons()
    received = load_file(tmp_path / "received")
    assert received.keys() == checkpoint.keys()
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in received.values()) > 10
    for name, tensor in checkpoint.items():
        assert received[name].dtype == tensor.dtype and received[name].shape == tensor.shape, name
        assert torch.equal(received[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_servers_hold_what_the_trainer_means(family, models, fp8_servers, trainer):
    """Before the first update (the folder and the sync are made by one function), and after each."""
    from megatron_fipo.checkpoint.hf import export_hf_weights

    bf16, fp8 = models[family]
    server, chunks = fp8_servers[family], trainer(bf16)
    served = ServedModel.of(str(bf16), ("--model-path", str(fp8)))
    stream = [(name, tensor.clone()) for name, tensor in served.format.convert(export_hf_weights(chunks, V))]
    sums = Checksums(name for name, _ in stream)
    for name, tensor in stream:
        sums.add(name, tensor)
    report = asyncio.run(server.post("/weights_checker", {"action": "checksum"}, 60, admin=True))
    reported = report["ranks"][0]["checksums"]
    assert sums.mismatch([reported]) is None and [*sums.values.values()] == [reported]

    sync, fleet = sync_of(models, family, chunks, server, check=True)
    for version in (1, 2):
        perturb(chunks, version)
        publish(sync, fleet, version)
        assert fleet.serving() == [server], fleet.reasons()
    sync.close()
    report = asyncio.run(server.post("/weights_checker", {"action": "checksum"}, 60, admin=True))
    assert not {*report["ranks"][0]["checksums"].values()} & {*reported.values()}


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_after_an_update(family, models, trainers, fp8_servers, tmp_path):
    """Log-probs are those of a model with the quantised weights' values, and not those of the unquantised one."""
    from transformers import AutoModelForCausalLM

    from megatron_fipo.checkpoint.hf import export_hf_weights

    (bf16, fp8), chunks, server = models[family], trainers[family], fp8_servers[family]
    sync, fleet = sync_of(models, family, chunks, server)
    publish(sync, fleet, 9)
    sync.close()
    assert fleet.serving() == [server], fleet.reasons()
    weights = {name: tensor.clone() for name, tensor in export_hf_weights(chunks, V)}
    weight_format = ServedModel.of(str(bf16), ("--model-path", str(fp8))).format
    values = dict(weights)
    for name, tensor in weights.items():
        parts = [part for _, part in weight_format.tensors(name, tensor)]
        values[name] = dequantize(*parts, torch.bfloat16) if len(parts) == 2 else tensor
    gaps = {}
    for kind, state in {"quantised": values, "unquantised": weights}.items():
        shutil.copytree(bf16, tmp_path / kind)
        save_file(state, tmp_path / kind / "model.safetensors", metadata={"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.bfloat16)
        gaps[kind] = sum(gap(model, server, prompt) for prompt in make_prompts(4, seed=2)) / 4
    print(family, gaps)
    assert gaps["quantised"] < 0.4 * gaps["unquantised"], gaps  # what is left is rounding to bf16


@torch.no_grad()
def gap(model, server, prompt) -> float:
    """Mean difference of the log-probs of 16 greedy tokens."""
    tokens, logp, _ = greedy(server, prompt, tokens=16)
    row = torch.tensor([[*prompt, *tokens]])
    wanted = model(row).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1).gather(1, row[0, len(prompt) :, None])
    return (wanted[:, 0] - torch.tensor(logp)).abs().mean().item()


def test_a_server_with_bf16_weights_is_refused(models, trainers, servers):
    """SGLang would take the FP8 numbers for weights, leave the scales out and report success."""
    server = servers["qwen3"][0]
    sync, fleet = sync_of(models, "qwen3", trainers["qwen3"], server)
    publish(sync, fleet, 1)
    sync.close()
    assert "it serves" in fleet.condemned[server] and "--sglang-model-path" in fleet.condemned[server]
