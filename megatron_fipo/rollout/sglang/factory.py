"""From flags to the engine: start or attach to the servers, let every rank know them all."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_fipo.checkpoint.hf import export_hf_weights, hf_layout
from megatron_fipo.errors import UserError
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rollout.engine import MAX_RUNNING
from megatron_fipo.rollout.sglang import engine
from megatron_fipo.rollout.sglang.buckets import TensorSpec
from megatron_fipo.rollout.sglang.client import Client
from megatron_fipo.rollout.sglang.colocated import ColocatedSync
from megatron_fipo.rollout.sglang.export import Export
from megatron_fipo.rollout.sglang.flags import tensor_parallel_size
from megatron_fipo.rollout.sglang.fleet import Fleet
from megatron_fipo.rollout.sglang.served import ServedModel
from megatron_fipo.rollout.sglang.server import Server
from megatron_fipo.rollout.sglang.servers import StartSettings, address_of, attach, gather_fleet, start_servers
from megatron_fipo.rollout.sglang.update_session import SyncSettings
from megatron_fipo.rollout.sglang.weight_sync import WeightSync

API_KEY, ADMIN_KEY = "SGLANG_API_KEY", "SGLANG_ADMIN_API_KEY"


def open_fleet(args: argparse.Namespace, log_folder: Path) -> Fleet:
    """The servers of --sglang-url, or those that the first rank of each node starts. Collective over all ranks.

    Started servers get the GPUs behind those of the node's trainer ranks, or with --sglang-colocate the same ones.
    Raises UserError.
    """
    ranks = int(os.environ["LOCAL_WORLD_SIZE"])
    if args.sglang_colocate and (needed := args.sglang_servers * tensor_parallel_size(args.sglang_flags)) > ranks:
        raise UserError(f"--sglang-colocate: the servers of a node need {needed} trainer ranks there, it has {ranks}")
    own: list[Server] = []
    if args.sglang_url and args.rank == 0:
        own = attach(args.sglang_url, os.environ.get(API_KEY, ""), os.environ.get(ADMIN_KEY, ""))
    elif args.sglang_servers and os.environ["LOCAL_RANK"] == "0":
        settings = StartSettings(
            model=ServedModel.of(args.hf_model, args.sglang_flags).folder,
            count=args.sglang_servers,
            flags=(*_memory_flags(args), *args.sglang_flags),
            dtype="bfloat16" if args.bf16 else "float32",
            seed=args.seed,
            log_folder=log_folder,
            host=address_of(args.sglang_host),
            port=args.sglang_port,
            first_gpu=0 if args.sglang_colocate else ranks,
        )
        own = start_servers(settings)
    return gather_fleet(own)


def open_weight_sync(args: argparse.Namespace, chunks: Sequence[torch.nn.Module], fleet: Fleet) -> engine.WeightSync:
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
    if args.sglang_colocate:
        server, group = _server_here(args, fleet)
        return ColocatedSync(_export(args, chunks, served, own_stage=False), fleet, settings, server, group)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return WeightSync(_export(args, chunks, served, own_stage=True), fleet, settings, stage)


def _export(
    args: argparse.Namespace, chunks: Sequence[torch.nn.Module], served: ServedModel, own_stage: bool
) -> Export:
    return Export(
        [TensorSpec(t.name, t.dtype, t.shape) for t in hf_layout(chunks, args.vocab_size, own_stage)],
        lambda: export_hf_weights(chunks, args.vocab_size, own_stage),
        served.format,
    )


def open_engine(
    args: argparse.Namespace, fleet: Fleet, sync: engine.WeightSync, replicas: Replicas
) -> engine.SGLangEngine:
    """The engine on these servers, whose weights come from ``sync``."""
    client = Client(fleet, args.vocab_size, args.rollout_max_running or MAX_RUNNING, replicas.rank)
    return engine.SGLangEngine(fleet, client, sync, replicas)


def _memory_flags(args: argparse.Namespace) -> tuple[str, ...]:
    """Without this flag a server keeps its memory when it is asked to give it back; it exists for GPUs only."""
    return ("--enable-memory-saver",) if args.sglang_colocate and torch.cuda.is_available() else ()


def _server_here(args: argparse.Namespace, fleet: Fleet) -> tuple[Server | None, Any]:
    """The server on this rank's device, and the trainer ranks on its devices if there are others. Collective."""
    ranks, size = int(os.environ["LOCAL_WORLD_SIZE"]), tensor_parallel_size(args.sglang_flags)
    here: tuple[Server | None, Any] = (None, None)
    for i, server in enumerate(fleet.servers):  # in the order of the nodes
        node, of_node = divmod(i, args.sglang_servers)
        first = node * ranks + of_node * size
        members = range(first, first + size)
        group = dist.new_group([*members], backend="gloo") if size > 1 else None
        if dist.get_rank() in members:
            here = server, group
    return here
