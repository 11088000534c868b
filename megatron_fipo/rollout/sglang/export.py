"""What a trainer rank gives to servers: the tensors, and their names, dtypes and shapes before any of them is made."""

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from megatron_fipo.quantization.formats import WeightFormat
from megatron_fipo.rollout.sglang.buckets import TensorSpec

WeightStream = Iterator[tuple[str, Tensor]]

_AS_TRAINED = WeightFormat()


class Export:
    """The same tensors in the same order at every pass; what differs from the list is found before it is sent."""

    def __init__(
        self,
        layout: Iterable[TensorSpec],
        stream: Callable[[], WeightStream],
        weight_format: WeightFormat = _AS_TRAINED,
    ) -> None:
        """
        Args:
            layout: what ``stream`` gives.
            stream: begins a pass over the trainer's weights under their HF names, a collective. A tensor must keep its
                values for as long as it is referenced.
            weight_format: in which servers take them.
        """
        self._stream, self._format = stream, weight_format
        self.layout = [
            TensorSpec(name, dtype, shape)
            for spec in layout
            for name, shape, dtype in weight_format.layout(spec.name, spec.shape, spec.dtype)
        ]
        """Of the tensors that are sent."""

    def to_send(self) -> WeightStream:
        """A pass over the tensors as servers take them."""
        return self._format.convert(self._stream())

    def to_take_part(self) -> WeightStream:
        """The same pass on a rank that sends nothing: nothing is quantised."""
        return self._stream()
