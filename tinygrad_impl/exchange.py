"""What the ranks of a trainer send each other in a step, a bucket (flat.py) at a time: gradients, and updated weights.

Nothing is waited for when it is sent, so that computing goes on meanwhile. A process that trains alone sends nothing.
"""

from collections.abc import Callable, Mapping

from tinygrad import Tensor

from data.ranks import Ranks, Work
from tinygrad_impl.internals import memory_of


class Exchange:
    """Sends by the names of buckets. `gradients` and `weights` are the buckets' memory, (elements,) each, which the
    trainer keeps; the weights are in the dtype in which kernels read them.

    `sharded`: each rank updates only its part of every bucket (ZeRO-1), so that it needs only that part's gradients,
    and the other parts' weights from the others. Gradients are sent in `dtype`.
    """

    def __init__(
        self,
        ranks: Ranks,
        gradients: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        sharded: bool,
        dtype: str,
    ):
        self.ranks, self.sharded, self.dtype = ranks, sharded, dtype
        self.gradients = {name: ranks.shared(memory_of(memory)) for name, memory in gradients.items()}
        self.weights = {name: ranks.shared(memory_of(memory)) for name, memory in weights.items()}
        self.averaging: list[Work] = []
        self.gathering: dict[str, Work] = {}

    def average(self, bucket: str) -> None:
        """Begins to make a bucket's gradients the means over ranks: all of them, or those of this rank's part."""
        send = self.ranks.reduce if self.sharded else self.ranks.average
        self.averaging.append(send(self.gradients[bucket], self.dtype))

    def wait_for_gradients(self) -> None:
        """Until the gradients are means over ranks."""
        for work in self.averaging:
            work.wait()
        self.averaging.clear()

    def complete_gradients(self) -> None:
        """Until all of them are, on all ranks."""
        self.wait_for_gradients()
        if self.sharded:
            for memory in self.gradients.values():
                self.ranks.collect(memory).wait()

    def gather(self, bucket: str) -> None:
        """Begins to give all ranks the parts of a bucket's weights that each rank has updated."""
        self.gathering[bucket] = self.ranks.collect(self.weights[bucket])

    def wait_for_weights(self, then: Callable[[str], None]) -> None:
        """Until all ranks have all parts. `then` is called with each bucket's name once it is there."""
        for bucket, work in self.gathering.items():
            work.wait()
            then(bucket)
        self.gathering.clear()
