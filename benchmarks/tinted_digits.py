"""Digits 8x8 in colours, each image in one of its own: a data set small enough to try colorization on.

    python -m benchmarks.tinted_digits
    python train.py --config=configs/digits.py --config.data.dataset=data/tinted_digits.npz \\
        --config.data.num_channels=3 --workdir=runs/tinted_digits
    python sample.py --workdir=runs/tinted_digits --task=colorize

Writes data/tinted_digits.npz. The colour is uniform in the cube [0, 1]^3 and tells nothing of the class.
"""

import pathlib

import numpy as np

from experiments import program
from score_sde import files, sources

PATH = pathlib.Path("data/tinted_digits.npz")


def main():
    random, arrays = np.random.Generator(np.random.Philox(0)), {}
    for split in ("train", "test"):
        digits = sources.load("digits", split, image_size=8, num_channels=1)
        batch = digits.take(np.arange(digits.size))
        colour = random.random((digits.size, 1, 1, 3))
        arrays |= {f"{split}_images": (batch["image"] * colour).astype(np.uint8), f"{split}_labels": batch["label"]}
    files.save_npz(PATH, arrays, compressed=True)
    print(f"wrote {PATH}")


if __name__ == "__main__":
    program.run(main)
