"""Makes the micro-batches of a pass, each in a thread while the one before it runs."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace

from torch import Tensor

from megatron_rl.train.step.batch import MicroBatch, Size, TrainSequence


@dataclass(frozen=True, kw_only=True)
class Prefetch:
    """Makes micro-batches of these sequences, as often as one goes through them; two at a time are on the device.

    sizes: of each. make: called in `thread`, which has one worker. fields: by their name in MicroBatch, values that
    each one gets.
    """

    parts: Sequence[Sequence[TrainSequence]]
    sizes: Sequence[Size]
    make: Callable[[Sequence[TrainSequence]], MicroBatch]
    thread: Executor
    fields: dict[str, Sequence[Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[MicroBatch]:
        coming = [self.thread.submit(self.make, part) for part in self.parts[:1]]
        for i in range(len(self.parts)):
            batch = coming.pop().result()
            coming += [self.thread.submit(self.make, part) for part in self.parts[i + 1 : i + 2]]
            yield replace(batch, **{name: values[i] for name, values in self.fields.items()})


def sizes_of(batches: Prefetch | Sequence[MicroBatch]) -> Sequence[Size]:
    return batches.sizes if isinstance(batches, Prefetch) else [batch.size for batch in batches]


def with_field(
    batches: Prefetch | Sequence[MicroBatch], name: str, values: Sequence[Tensor]
) -> "Prefetch | Sequence[MicroBatch]":
    """Return the same micro-batches, each with its value; unchanged where there are no values, which only last pipeline
    stages have."""
    if not values:
        return batches
    if isinstance(batches, Prefetch):
        return replace(batches, fields=batches.fields | {name: values})
    return [replace(batch, **{name: value}) for batch, value in zip(batches, values, strict=True)]
