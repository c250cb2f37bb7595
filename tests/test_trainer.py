"""A training whose images may be damaged, replaced or tiny: what is kept, what is refused, what is said."""

import json
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from configs import digits
from experiments import build, runs, trainer
from score_sde import checkpoint, models, sources, training
from score_sde.errors import UserError


class OneNumber(nn.Module):
    """The smallest of networks."""

    num_classes: int = 0

    @nn.compact
    def __call__(self, x, label, y=None, dropout_keys=None):
        return x * self.param("scale", nn.initializers.ones, (1, 1, 1, 1))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(models.MODELS, "one_number", OneNumber)
    monkeypatch.setattr(trainer, "catch_stop_signals", list)
    monkeypatch.setattr(trainer, "samples", lambda model: lambda *arguments: None)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as the programs run
        yield


def config_of(dataset, steps=20, **options):
    """A training of so many steps; options: fields of data and training."""
    config = digits.get_config()
    config.unlock()
    config.model = dict(name="one_number")
    config.data.dataset, config.training.n_iters = str(dataset), steps
    config.training.update(batch_size=8, checkpoint_freq=1000, keep_freq=1000, eval_freq=10, log_freq=5)
    for name, value in options.items():
        (config.data if name in config.data else config.training)[name] = value
    return config.lock()


def make_images(folder, count=40, seed=0):
    rng = np.random.default_rng(seed)
    for i in range(count):
        path = folder / ("cat", "dog")[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return folder


def params_of(workdir, config, step):
    optimizer, init = training.make_optimizer(**config.optim), build.trainable(config).init
    template = jax.eval_shape(lambda key: training.init_state(init(key), optimizer), jax.random.key(0))
    return jax.tree.leaves(checkpoint.Checkpoints(workdir).restore(step, template)[0])


def test_a_run_continues_on_the_same_data_alone(tmp_path, capsys):
    """A batch of 8 is more than the 4 test images; where the folder lies is no matter of its content."""
    images, workdir = make_images(tmp_path / "images"), tmp_path / "run"
    assert trainer.train(config_of(images), workdir) == 0
    out = capsys.readouterr().out
    assert "classes: 0 cat, 1 dog" in out
    assert json.loads((workdir / "classes.json").read_text()) == {"0": "cat", "1": "dog"}
    assert runs.read_classes(workdir) == ["cat", "dog"]
    shutil.move(images, tmp_path / "before")
    make_images(images, seed=1)
    with pytest.raises(UserError, match=r"was trained on other data: images of .* were replaced"):
        trainer.train(config_of(images, 30), workdir)
    shutil.rmtree(images)
    shutil.copytree(tmp_path / "before", images)  # restored, as the line says
    assert trainer.train(config_of(images, 30), workdir) == 0
    assert "continuing at step 20" in capsys.readouterr().out


def test_a_damaged_image_in_the_middle(tmp_path, monkeypatch, capsys):
    """What was trained is saved; both ways that the line offers lead on, the one bit for bit as if never stopped."""
    monkeypatch.setattr(sources, "MEMORY_BYTES", 0)
    images = make_images(tmp_path / "images", 100)
    order = trainer.data.permutation(0, 0, 100)  # which images are for training
    stream = trainer.data.permutation(digits.get_config().seed, 0, 90)
    path = sorted(images.rglob("*.png"))[order[stream[8 * 9]]]  # the first image of step 9
    content = path.read_bytes()
    path.write_bytes(content[:60])
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match=rf"{path.name} is not a readable image.*the 9 steps before it are saved"):
        trainer.train(config_of(images, 1000), workdir)
    assert checkpoint.Checkpoints(workdir).steps() == [9]
    shutil.copytree(workdir, tmp_path / "other")
    capsys.readouterr()

    skipping = config_of(images, 30, skip_damaged=True)
    assert trainer.train(skipping, workdir) == 0
    assert "continuing at step 9" in capsys.readouterr().out
    assert trainer.train(skipping, tmp_path / "whole") == 0
    out = "".join(capsys.readouterr())
    assert "passed over 1 damaged image(s)" in out
    assert path.name in out
    for one, two in zip(params_of(workdir, skipping, 30), params_of(tmp_path / "whole", skipping, 30), strict=True):
        np.testing.assert_array_equal(one, two)

    path.write_bytes(content)
    assert trainer.train(config_of(images, 12), tmp_path / "other") == 0
    assert "continuing at step 9" in capsys.readouterr().out


def test_one_image_trains(tmp_path, capsys):
    images = make_images(tmp_path / "images", 1)
    assert trainer.train(config_of(images, 10, batch_size=1), tmp_path / "run") == 0
    assert "1 image(s), of which all are for training and for test" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"batch_size 8 exceeds the 1 images .*take a smaller one"):
        trainer.train(config_of(images), tmp_path / "another")
    assert not (tmp_path / "another").exists()
