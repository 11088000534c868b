"""A process that takes a weight update with SGLang's own bucket class and writes what it rebuilt.

python bucket_receiver.py FILE < names.json    (tools/benchmarks/weight_receiver.py says the rest)
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from benchmarks.weight_receiver import Receiver, serve  # noqa: E402

from megatron_fipo.compat import sglang_cpu  # noqa: E402

sglang_cpu.install()
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket  # noqa: E402


class BucketReceiver(Receiver):
    def update_weights_from_distributed(
        self, names: list, dtypes: list, shapes: list, group_name: str, weight_version: str | None, **_: Any
    ) -> None:
        bucket = FlattenedTensorBucket.empty(names, dtypes, shapes, "cpu")
        dist.broadcast(bucket.get_flattened_tensor(), src=0, group=self.groups[group_name])
        self.tensors |= dict(bucket.reconstruct_tensors())
        self.version = weight_version or self.version

    def end_weight_update(self, **_: Any) -> None:
        save_file({name: tensor.clone() for name, tensor in self.tensors.items()}, sys.argv[1])


if __name__ == "__main__":
    asyncio.run(serve(BucketReceiver(json.load(sys.stdin), with_sums=False)))
