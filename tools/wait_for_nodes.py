"""Wait until every node of a run is there, or say which ones are not.

python tools/wait_for_nodes.py --nnodes 16 --node-rank 3 --master-addr node0 --port 29501 --timeout 600

Started on every node before torchrun, which only counts: "1/16 clients joined". Node 0 keeps the list. Exit code 0 when
all nodes came, 3 when some did not; then every node that can reach node 0 prints the same sentence.
"""

import argparse
import os
import sys
import time
from datetime import timedelta

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # a node that is not there yet is no reason for a stack trace
from torch.distributed import DistError, TCPStore  # noqa: E402

LAST_LOOK = 5.0  # seconds in which the others hear from node 0 how it ended


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnodes", type=int, required=True)
    parser.add_argument("--node-rank", type=int, required=True, help="0 .. nnodes - 1")
    parser.add_argument("--master-addr", required=True, help="address of node 0")
    parser.add_argument("--port", type=int, required=True, help="free on node 0")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds")
    args = parser.parse_args()
    if not 0 <= args.node_rank < args.nnodes:
        parser.error(f"--node-rank {args.node_rank} must lie in 0..{args.nnodes - 1}, as --nnodes is {args.nnodes}")
    try:
        missing = missing_nodes(args.nnodes, args.node_rank, args.master_addr, args.port, args.timeout)
    except DistError:
        problem = f"cannot be reached within {args.timeout:g} s: start it there, and check --master-addr and firewall"
        print(f"wait_for_nodes: node 0 at {args.master_addr}:{args.port} {problem}", file=sys.stderr)
        return 3
    if missing:
        here = f"{args.nnodes - len(missing)} of {args.nnodes} nodes came within {args.timeout:g} s"
        print(f"wait_for_nodes: {here}; missing: node rank {', '.join(map(str, missing))}", file=sys.stderr)
        return 3
    return 0


def missing_nodes(nnodes: int, rank: int, address: str, port: int, timeout: float) -> list[int]:
    """Ranks of the nodes that did not come within `timeout` seconds; the same list on every node.

    Raises DistError if node 0 cannot be reached.
    """
    deadline = time.monotonic() + timeout
    store = TCPStore(address, port, is_master=rank == 0, timeout=timedelta(seconds=timeout), wait_for_workers=False)
    store.set(f"here/{rank}", "")
    if rank == 0:
        missing = [r for r in range(nnodes) if not _comes(store, f"here/{r}", deadline)]
        store.set("missing", ",".join(map(str, missing)))
        last_look = time.monotonic() + LAST_LOOK
        for other in set(range(1, nnodes)) - set(missing):  # the store ends with this process: let all read it first
            _comes(store, f"heard/{other}", last_look)
        return missing
    store.wait(["missing"], timedelta(seconds=timeout + LAST_LOOK))
    answer = store.get("missing").decode()
    store.set(f"heard/{rank}", "")
    return [int(r) for r in answer.split(",") if r]


def _comes(store: TCPStore, key: str, deadline: float) -> bool:
    """Whether `key` is set before `deadline` (time.monotonic)."""
    try:
        store.wait([key], timedelta(seconds=max(deadline - time.monotonic(), 0.05)))
    except DistError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
