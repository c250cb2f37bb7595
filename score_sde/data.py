"""Images as a stream of batches that is a function of (seed, step) alone.

    images = sources.load("cifar10", "train", image_size=32, num_channels=3)
    for step, batch in Stream(images, batch_size=128, seed=0).batches(start_step):  # uint8, resumes at any step
        x = jax.vmap(space.encode)(keys, batch["image"])                            # float32, on the device

The stream is NumPy index arithmetic instead of a data-loading library: one gather for a batch in memory is about ten
times as fast as one call per image, and the step alone is the iterator's state.
"""

import collections
import functools
import hashlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from score_sde.errors import UserError


class Images(NamedTuple):
    """One split, ready to train on.

    take: indices (b,) -> {"image": uint8 (b, H, W, C), "label": int32 (b,)}, without "label" if the set has none.
    classes: the names of labels 0, 1, ..., if they have any.
    notes: lines that a user should know of the whole set, such as what was passed over.
    damaged: what is wrong with the images that were found damaged so far, by index.
    marks: () -> a hash of each image as stored, uint64 (size,).
    """

    name: str
    size: int
    take: Callable[[np.ndarray], dict[str, np.ndarray]]
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    damaged: Mapping[int, str] = MappingProxyType({})
    marks: Callable[[], np.ndarray] | None = None


def repeat(images: Images, least: int) -> Images:
    """The images over and over again, whole times, until there are at least so many; as they are if there are."""
    times = -(-least // images.size)
    return images._replace(
        size=times * images.size, take=lambda indices: images.take(np.asarray(indices) % images.size)
    )


def identity(marks: np.ndarray, without: Collection[int] = ()) -> str:
    """A hash of a set's `marks` that changes with any of its images but those `without`."""
    kept = np.delete(marks, sorted(without))
    return hashlib.sha256(kept.astype("<u8").tobytes()).hexdigest()


def gather(arrays: dict[str, np.ndarray], indices) -> dict[str, np.ndarray]:
    """The rows `indices` of each array."""
    return {key: array[indices] for key, array in arrays.items()}


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of the images in one epoch: int64 (size,).

    Sorts raw Philox bits, which NumPy promises never to change (it does not for Generator.permutation).
    """
    bits = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)).random_raw(size)
    order = np.argsort(bits, kind="stable")
    order.flags.writeable = False  # it is cached
    return order


class Stream:
    """Endless shuffled batches; each epoch is a new permutation, and batches run on over its end without loss.

    batch_size counts all processes; process i of n holds the i-th of n equal blocks of each batch.
    Raises UserError if the processes cannot share a batch equally or if a batch would repeat an image of its epoch.
    """

    def __init__(self, images: Images, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1):
        if batch_size < 1 or batch_size % process_count:
            raise UserError(f"batch_size {batch_size} is not a positive multiple of the {process_count} processes")
        if batch_size > images.size:
            raise UserError(
                f"batch_size {batch_size} exceeds the {images.size} images of {images.name}: take a smaller one"
            )
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.block = np.arange(batch_size).reshape(process_count, -1)[process_index]

    def indices(self, step: int) -> np.ndarray:
        """Which images this process's part of batch `step` holds: int64 (batch_size / process_count,)."""
        epochs, places = np.divmod(step * self.batch_size + self.block, self.images.size)
        chosen = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = permutation(self.seed, int(epoch), self.images.size)[places[here]]
        return chosen

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's part of batch `step`, as `Images.take` returns it."""
        return self.images.take(self.indices(step))

    def batches(self, start_step: int = 0, *, prefetch: int = 2) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(step, batch) from start_step on, read `prefetch` batches ahead by a thread that ends with the iterator."""
        worker = ThreadPoolExecutor(1)
        try:
            pending = collections.deque(worker.submit(self.batch, start_step + i) for i in range(prefetch))
            for step in itertools.count(start_step):
                pending.append(worker.submit(self.batch, step + prefetch))
                yield step, pending.popleft().result()
        finally:
            worker.shutdown(cancel_futures=True)
