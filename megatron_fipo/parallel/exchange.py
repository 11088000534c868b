"""Collectives over the data-parallel replicas: small tables to everyone, samples to where the plan wants them."""

import pickle
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def gather_in_turn(rows: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
    """[count, ...]: the rows of ``count`` items, of which replica r of n holds every n-th from r on; on the CPU.

    ``rows`` [ceil(count / n), ...] has the same shape on every replica; what the last, uneven turn lacks is padding.
    """
    gathered = rows.new_empty((group.size() * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
    return gathered.cpu().unflatten(0, (group.size(), rows.shape[0])).transpose(0, 1).flatten(0, 1)[:count]


def send_to_replicas[T](
    outgoing: Sequence[Mapping[int, T]], group: dist.ProcessGroup, device: torch.device
) -> dict[int, T]:
    """Deliver ``outgoing[replica]`` {number: item} to each replica; return all that was addressed to this one.

    Point to point (all_to_all), so no replica ever holds more than its own share. The bytes travel between the ranks
    of one job only; pickle never meets a file or a foreign process.
    """
    if group.size() == 1:
        return dict(outgoing[0])
    blobs = [torch.frombuffer(bytearray(pickle.dumps(dict(items))), dtype=torch.uint8) for items in outgoing]
    send_sizes = torch.tensor([b.numel() for b in blobs], dtype=torch.int64, device=device)
    receive_sizes = torch.empty_like(send_sizes)
    dist.all_to_all_single(receive_sizes, send_sizes, group=group)
    sizes = receive_sizes.tolist()
    received = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    dist.all_to_all_single(received, torch.cat(blobs).to(device), sizes, send_sizes.tolist(), group=group)
    items: dict[int, T] = {}
    for blob in received.cpu().split(sizes):
        items.update(pickle.loads(blob.numpy().tobytes()))
    return items
