"""The reference model of a KL: weights that stay as they are, and take the policy's place for a forward pass."""

import contextlib
import weakref
from collections.abc import Iterator, Sequence

import torch

from megatron_fipo.checkpoint.hf import load_hf_weights

_ALIGNMENT = 64  # bytes, as of tensors of their own


class ReferenceWeights:
    """This rank's parameters of the reference model, in host memory (pinned where the model is on a GPU).

    It costs a rank the host memory of its parameters, and no memory of its device but that of one parameter.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], hf_dir: str) -> None:
        """Read a Hugging Face folder of the policy's architecture. The policy keeps its weights, bit for bit.

        chunks: the policy's, which must hold all their weights (`Policy.gather_weights`).

        Raises:
            UserError: tensors are missing, superfluous, misshapen or not finite.
        """
        self._parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self._host = host_memory(self._parameters)
        if self._parameters[0].is_cuda:
            self._pin()
        self._exchange()  # the policy's weights go to the host, what they leave behind is overwritten
        load_hf_weights(chunks, hf_dir)
        self._exchange()

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the policy's parameters hold the reference model's weights; behind it, again their own bits.

        Parameters keep their place in memory, so that DDP's buffers and the optimizer's views stay what they are. The
        optimizer's fp32 main parameters are not touched.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _pin(self) -> None:
        """Lock the copies' memory itself: torch's pinned allocator takes the next power of two, up to twice as much."""
        storage = self._host[0].untyped_storage()
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(storage.data_ptr(), storage.nbytes(), 0))
        weakref.finalize(self, runtime.cudaHostUnregister, storage.data_ptr())

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swap the weights on the device with those on the host: either is whole at any time."""
        for parameter, host in zip(self._parameters, self._host, strict=True):
            own = parameter.clone()
            parameter.copy_(host, non_blocking=True)
            host.copy_(own, non_blocking=True)  # after the copy above: they are on one stream
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def host_memory(parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    """A tensor like each parameter, one behind the other in one block of host memory."""
    sizes = [-(-p.nbytes // _ALIGNMENT) * _ALIGNMENT for p in parameters]
    parts = torch.empty(sum(sizes), dtype=torch.uint8).split(sizes)
    return [part[: p.nbytes].view(p.dtype).view(p.shape) for p, part in zip(parameters, parts, strict=True)]
