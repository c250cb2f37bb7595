"""Train a local feature network, a ResNet-20 classifier, on a labelled data set.

    python -m tools.train_features --dataset=cifar10 --name=cifar10 --image_size=32 --num_channels=3 --epochs=60

Random flips, and shifts by up to a sixteenth of the image; AdamW, learning rate up and down in one cycle. Writes
score_sde/metrics/weights/resnet20_<name>.npz, half-precision weights with their test accuracy and how they were made.
State is kept in runs/resnet20_<name>/state.npz every 100 steps; the same command continues a run that was stopped.
"""

import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from tqdm import tqdm

from experiments import build, program
from score_sde import VERSION, data, files, seeds, sources
from score_sde.errors import UserError
from score_sde.metrics import resnet

DATASET = program.path_flag("dataset", None, "As config.data.dataset.", required=True)
NAME = program.name_flag("name", None, "The network will be called resnet20-<name>.", required=True)
IMAGE_SIZE = flags.DEFINE_integer("image_size", None, "Side of the images.", required=True)
NUM_CHANNELS = flags.DEFINE_integer("num_channels", None, "1 or 3.", required=True)
EPOCHS = flags.DEFINE_integer("epochs", None, "Times through the training images.", required=True, lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Images a step.", lower_bound=1)
LEARNING_RATE = flags.DEFINE_float("learning_rate", 3e-3, "The largest of the cycle.")
FOLDER = program.path_flag("folder", str(resnet.WEIGHTS), "Where to write resnet20_<name>.npz.")
SEED = program.seed_flag("Seed of parameters, order and augmentation.")


def main():
    path, provenance = train_features(
        DATASET.value,
        NAME.value,
        image_size=IMAGE_SIZE.value,
        num_channels=NUM_CHANNELS.value,
        epochs=EPOCHS.value,
        batch_size=BATCH_SIZE.value,
        learning_rate=LEARNING_RATE.value,
        folder=FOLDER.value,
        seed=SEED.value,
    )
    print(json.dumps(provenance, indent=2))
    print(f"resnet20-{NAME.value}: test accuracy {100 * provenance['test_accuracy']:.2f} %, wrote {path}")


def train_features(
    dataset: str,
    name: str,
    *,
    image_size: int,
    num_channels: int,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    folder: str = str(resnet.WEIGHTS),
    seed: int = 0,
) -> tuple[pathlib.Path, dict]:
    """Train a network, or go on where it was stopped; returns its file and provenance. Arguments as the flags."""
    checkpoint_path = pathlib.Path("runs") / f"resnet20_{name}" / "state.npz"
    for place in (folder, checkpoint_path.parent):
        files.check_writable(place)
    path = pathlib.Path(folder) / f"resnet20_{name}.npz"
    if path.exists() and not checkpoint_path.exists():
        raise UserError(f"{path} holds a network of another training: choose another --name, or delete it")
    load = lambda split: sources.load(dataset, split, image_size=image_size, num_channels=num_channels)
    images, held_out = load("train"), load("test")
    build.say(images)
    everything = images.take(np.arange(images.size))
    if "label" not in everything:
        raise UserError(f"{images.name} has no labels to learn: give a labelled data set")
    stream = data.Stream(images, batch_size=batch_size, seed=seed)
    num_steps = epochs * images.size // batch_size
    image_shape = (image_size, image_size, num_channels)
    network = resnet.ResNet20(int(everything["label"].max()) + 1)
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(num_steps, learning_rate), weight_decay=0.02)

    @jax.jit
    def train_step(step, params, optimizer_state, image, label):
        keys = jax.random.split(jax.random.fold_in(seeds.key(seed), step), len(image))
        x = jax.vmap(augment)(keys, image)

        def loss(params):
            _, logits = network.apply({"params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state, value

    params = network.init(seeds.key(seed), jnp.zeros((1, *image_shape)))["params"]
    state, start = (params, optimizer.init(params)), 0
    identity = f"{images.name} {images.size} {image_shape} {num_steps} {batch_size} {learning_rate} {seed}"
    if checkpoint_path.exists():
        with files.reading(checkpoint_path, "is damaged", "remove it to start again"):
            arrays = files.load_npz(checkpoint_path)
            theirs, start = str(arrays["identity"]), int(arrays["step"])
            leaves = [jnp.asarray(arrays[f"leaf{i}"]) for i in range(len(jax.tree.leaves(state)))]
        if theirs != identity:
            raise UserError(f"{checkpoint_path} belongs to another training ({theirs}): remove it or change --name")
        state = jax.tree.unflatten(jax.tree.structure(state), leaves)
        print(f"continuing at step {start} of {num_steps}")

    began = time.monotonic()
    with tqdm(total=num_steps, initial=start, unit="step", dynamic_ncols=True, mininterval=5.0) as bar:
        for step, batch in stream.batches(start):
            if step == num_steps:
                break
            *state, value = train_step(step, *state, batch["image"], batch["label"])
            bar.update()
            if (step + 1) % 100 == 0:
                bar.set_postfix_str(f"loss {float(value):.3f}")
                leaves = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tuple(state)))}
                files.save_npz(checkpoint_path, leaves | dict(identity=identity, step=step + 1))
    minutes = (time.monotonic() - began) / 60

    provenance = dict(
        network="ResNet-20, group normalization",
        data=pathlib.Path(dataset).stem,
        num_train=images.size,
        num_test=held_out.size,
        image_shape=image_shape,
        num_classes=network.num_classes,
        epochs=epochs,
        steps=num_steps,
        minutes_since_resumed=round(minutes, 1),
        command=" ".join(["python -m tools.train_features", *sys.argv[1:]]),
        versions=dict(score_sde=VERSION, jax=jax.__version__),
    )
    half = jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), state[0])  # as it will be used
    provenance["test_accuracy"] = round(accuracy(network, half, held_out), 4)
    resnet.save(path, half, provenance)
    return path, provenance


def augment(key, image):
    """A uint8 image (H, W, C), flipped at random and shifted over a black border, as float32 levels."""
    flip_key, shift_key = jax.random.split(key)
    image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
    most = image.shape[0] // 16
    top, left = jax.random.randint(shift_key, (2,), 0, 2 * most + 1)
    padded = jnp.pad(image, ((most, most), (most, most), (0, 0)))
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape).astype(jnp.float32)


def accuracy(network, params, images: data.Images) -> float:
    """Share of images classified rightly."""
    predict = jax.jit(lambda x: network.apply({"params": params}, x)[1].argmax(-1))
    right = 0
    for start in range(0, images.size, 500):
        batch = images.take(np.arange(start, min(start + 500, images.size)))
        right += int((np.asarray(predict(batch["image"].astype(np.float32))) == batch["label"]).sum())
    return right / images.size


if __name__ == "__main__":
    program.run(main)
