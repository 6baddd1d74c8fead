"""Which sample comes when, and with which random numbers: a function of (seed, epoch, index) and of nothing else.

The order of an epoch and the augmentation of each image are keyed, so a run gives the same batches whatever the number
of worker processes, and a run that was killed continues with the batch it would have seen next.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler

Key = tuple[int, int, int]
"""(epoch, index, copy): what a sampler hands to a dataset. The key carries the epoch, so workers may live on."""


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Put the states of Python's, NumPy's and torch's (CPU) generators back after the block."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_rng(*key: int) -> None:
    """Seed Python, NumPy and torch (CPU) from ``key``.

    >>> with preserved_rng():
    ...     seed_rng(0, 3, 7)
    ...     a = random.random(), np.random.rand(), torch.rand(()).item()
    ...     seed_rng(0, 3, 7)
    ...     a == (random.random(), np.random.rand(), torch.rand(()).item())
    True
    """
    words = np.random.SeedSequence(key).generate_state(4, np.uint32).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2] << 32 | words[3])  # not torch.manual_seed, which seeds GPUs too


class KeyedSampler(DistributedSampler):
    """The keys of one epoch for one of ``ranks`` processes.

    Rank r takes entries r, r + ranks, … of one global order, so that the batches of all ranks together are the batch
    that a single process would have drawn. With ``shuffle`` (training) every rank gets equally many keys and at most
    ``ranks - 1`` entries are left out; without it (evaluation) nothing is left out and nothing is repeated.

    Args:
        size: Number of samples in the data set.
        seed: Seed of the order.
        shuffle: Draw a new permutation in each epoch.
        repeats: Repeated augmentation (Hoffer et al., 2019, arXiv:1901.09335): each image that is drawn comes this
            many times in a row, differently augmented; an epoch keeps its length and so sees fewer images.
        rank, ranks: This process, and how many there are.
    """

    def __init__(self, size: int, *, seed: int, shuffle: bool, repeats: int = 1, rank: int = 0, ranks: int = 1):
        super().__init__(range(size), num_replicas=ranks, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.size, self.repeats = size, repeats
        self.start = 0  # keys of this rank's epoch that were consumed before the run was killed

    def __iter__(self) -> Iterator[Key]:
        size = self.size
        order = np.random.default_rng((self.seed, self.epoch)).permutation(size) if self.shuffle else np.arange(size)
        entries = np.arange(size)
        indices, copies = order[entries // self.repeats], entries % self.repeats
        mine = slice(self.rank, None, self.num_replicas)
        keys = zip(indices[mine].tolist(), copies[mine].tolist(), strict=True)
        for number, (index, copy) in enumerate(keys):
            if self.start <= number < len(self):
                yield self.epoch, index, copy

    def __len__(self) -> int:
        return self.size // self.num_replicas if self.shuffle else len(range(self.rank, self.size, self.num_replicas))


class ResumableLoader(DataLoader):
    """A DataLoader over a ``KeyedSampler`` that starts each epoch behind the batches already consumed.

    Lightning makes the iterator before it has told the sampler the epoch and before the position in a resumed epoch is
    known; a generator asks for both at the first batch. ``len`` stays the length of the whole epoch.

    Args:
        position: Returns how many batches of the current epoch are done: zero unless a run is being resumed.
    """

    def __init__(self, *args: Any, position: Callable[[], int], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.position = position

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        cast(KeyedSampler, self.sampler).start = self.position() * self.batch_size
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Empty: the position is in the state of Lightning's loops, which asks resumable loaders to have this."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load, see ``state_dict``."""
