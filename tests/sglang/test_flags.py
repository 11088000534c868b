"""Flags for servers, and what is refused before anything starts."""

import psutil
import pytest

from megatron_fipo.arguments import parse_arguments
from megatron_fipo.errors import UserError
from megatron_fipo.rollout.sglang.flags import split_flags

BASE = ["--preset", "quickstart", "--dry-run"]
SGLANG = [*BASE, "--rollout-engine", "sglang"]


def test_any_server_flag_passes():
    words = ["--lr", "1", "--sglang-tp-size", "2", "--sglang-enable-metrics", "--sglang-cuda-graph-bs", "1", "2", "-3"]
    words += ["--seed", "4", "--sglang-x=y", "--sglang-servers", "2"]
    trainer, servers = split_flags(words)
    assert trainer == ["--lr", "1", "--seed", "4", "--sglang-servers", "2"]
    assert servers == ("--tp-size", "2", "--enable-metrics", "--cuda-graph-bs", "1", "2", "-3", "--x", "y")
    args = parse_arguments([*SGLANG, "--sglang-servers", "2", "--sglang-tp-size", "2"])
    assert args.sglang_servers == 2 and args.sglang_flags == ("--tp-size", "2")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rollout-engine sglang", "either --sglang-servers N"),
        ("--rollout-engine sglang --sglang-servers 1 --sglang-url http://a:1", "either --sglang-servers N"),
        ("--rollout-engine sglang --sglang-servers 0", "--sglang-servers 0 must be at least 1"),
        ("--rollout-engine sglang --sglang-url a:1", "--sglang-url a:1 is no server's address"),
        ("--rollout-engine sglang --sglang-url http://a:1 --sglang-tp-size 2", "--sglang-tp-size is for servers"),
        ("--sglang-colocate", "--sglang-colocate needs --rollout-engine sglang"),
        ("--rollout-engine sglang --sglang-url http://a:1 --sglang-colocate", "--sglang-colocate is for servers"),
        ("--sglang-servers 1", "--sglang-servers needs --rollout-engine sglang"),
        ("--sglang-tp-size 2", "--sglang-tp-size needs --rollout-engine sglang"),
        ("--rollout-engine sglang --sglang-servers 1 --sglang-api-key x", "--sglang-api-key is not passed on"),
        ("--rollout-engine sglang --sglang-servers 1 --sglang-enable-custom-logit-processor", "is not passed on"),
        ("--rollout-top-p 0.9", "--rollout-top-p is not used here"),
        ("--rollout-top-k 5", "--rollout-top-k is not used here"),
    ],
)
def test_mistakes(flags, message):
    with pytest.raises(UserError, match=message):
        parse_arguments([*BASE, *flags.split()])


def test_servers_of_several_nodes_need_an_interface(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match="--sglang-host 127.0.0.1 cannot be reached from the other nodes"):
        parse_arguments([*SGLANG, "--sglang-servers", "1"])
    parse_arguments([*SGLANG, "--sglang-servers", "1", "--sglang-host", "eth0"])


def test_a_server_inherits_nothing_that_is_the_trainer_s_alone(monkeypatch):
    from megatron_fipo.rollout.sglang.servers import server_environment

    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    environment = server_environment()
    assert environment["NCCL_SOCKET_IFNAME"] == "eth0" and "x" not in environment.values()


def test_colocated_servers_need_memory_that_can_be_handed_over(monkeypatch):
    flags = [*SGLANG, "--sglang-servers", "1", "--sglang-colocate"]
    parse_arguments(flags)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True")
    with pytest.raises(UserError, match="export PYTORCH_CUDA_ALLOC_CONF="):
        parse_arguments(flags)


def test_a_window_too_narrow_for_the_servers_is_named(trained_base):
    data = ["--hf-model", str(trained_base), "--prompt-data", str(trained_base / "train.jsonl")]
    flags = [*SGLANG, *data, "--sglang-servers", "1", "--max-prompt-tokens", "32"]
    parse_arguments([*flags, "--rollout-max-tokens", "96"])
    with pytest.raises(UserError, match="exceed max_position_embeddings 128 of .*config.json"):
        parse_arguments([*flags, "--rollout-max-tokens", "97"])


def test_old_versions_and_open_interfaces_are_refused():
    from megatron_fipo.rollout.sglang.servers import address_of, check_version

    check_version("0.5.23", "here")
    for version in ("0.4.6", "0.5.9", "0.5.10", "0.5.10.post1"):
        with pytest.raises(UserError, match="CVE"):
            check_version(version, "here")
    with pytest.raises(UserError, match="every interface"):
        address_of("0.0.0.0")
    assert address_of("10.1.2.3") == "10.1.2.3"
    assert any(address_of(name) == "127.0.0.1" for name in psutil.net_if_addrs())
