"""From flags to the engine: start or attach to the servers, let every rank know them all."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_fipo.checkpoint.hf import export_hf_weights
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rollout.sglang.client import Client
from megatron_fipo.rollout.sglang.engine import SGLangEngine
from megatron_fipo.rollout.sglang.fleet import Fleet
from megatron_fipo.rollout.sglang.served import ServedModel
from megatron_fipo.rollout.sglang.server import Server
from megatron_fipo.rollout.sglang.servers import StartSettings, address_of, attach, gather_fleet, start_servers
from megatron_fipo.rollout.sglang.update_session import SyncSettings
from megatron_fipo.rollout.sglang.weight_sync import WeightSync

API_KEY, ADMIN_KEY = "SGLANG_API_KEY", "SGLANG_ADMIN_API_KEY"


def open_fleet(args: argparse.Namespace, log_folder: Path) -> Fleet:
    """The servers of --sglang-url, or those that the first rank of each node starts. Collective over all ranks.

    Started servers get the GPUs behind those of the node's trainer ranks. Raises UserError.
    """
    own: list[Server] = []
    if args.sglang_url and args.rank == 0:
        own = attach(args.sglang_url, os.environ.get(API_KEY, ""), os.environ.get(ADMIN_KEY, ""))
    elif args.sglang_servers and os.environ["LOCAL_RANK"] == "0":
        settings = StartSettings(
            model=ServedModel.of(args.hf_model, args.sglang_flags).folder,
            count=args.sglang_servers,
            flags=args.sglang_flags,
            dtype="bfloat16" if args.bf16 else "float32",
            seed=args.seed,
            log_folder=log_folder,
            host=address_of(args.sglang_host),
            port=args.sglang_port,
            first_gpu=int(os.environ["LOCAL_WORLD_SIZE"]),
        )
        own = start_servers(settings)
    return gather_fleet(own)


def open_weight_sync(args: argparse.Namespace, chunks: Sequence[torch.nn.Module], fleet: Fleet) -> WeightSync:
    """What brings the weights of these model chunks to the servers."""
    served = ServedModel.of(args.hf_model, args.sglang_flags)
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    settings = SyncSettings(
        bucket_bytes=args.weight_sync_bucket_mb * 2**20,
        pause=args.weight_sync_pause,
        check=args.check_weights,
        kv_heads=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        deadline_s=args.weight_sync_deadline,
        fault_of=lambda info: served.fault(info, capability),
    )
    return WeightSync(
        lambda: export_hf_weights(chunks, args.vocab_size, own_stage=True),
        fleet,
        settings,
        quantize=served.format.convert,
        stage=parallel_state.get_pipeline_model_parallel_rank(),
    )


def open_engine(args: argparse.Namespace, fleet: Fleet, sync: WeightSync, replicas: Replicas) -> SGLangEngine:
    """The engine on these servers, whose weights come from ``sync``."""
    client = Client(fleet, args.vocab_size, args.rollout_max_running, replicas.rank)
    return SGLangEngine(fleet, client, sync, replicas)
