"""Autoencoders trained here: what they reach on test images, and how a new run takes one to train in its latents."""

import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments import build, figures, parts, quality, runs, samplers
from score_sde import checkpoint, data
from score_sde.errors import UserError
from score_sde.latents import Coder
from score_sde.models.autoencoder import gaussian, kl_divergence

AT_ONCE = 64  # images that pass an autoencoder together
MEASURED = 1024  # images that the scale of latents is measured on


def reconstructions(config: ConfigDict, coder: Coder, n: int = 1000, pictured: int = 32):
    """(params, workdir, board, step): show how n test images come back from the means of their latents.

    Shown is the mean of the images' own PSNR.
    """
    images = build.images_of(config, "test", tell=False)
    levels = images.take(np.arange(min(n, images.size)))["image"]

    @jax.jit
    def back_and_kl(params, levels):
        def one(image):
            apply = lambda x, method: coder.network.apply({"params": params}, x[None], method=method)
            moments = apply(coder.space.encode(None, image), "encode")
            back = coder.space.decode(apply(gaussian(moments)[0][0], "decode"))
            return back[0], kl_divergence(moments)[0]

        return jax.lax.map(one, levels, batch_size=AT_ONCE)

    def show(params, workdir, board, step):
        back, kl = map(np.asarray, back_and_kl(params, levels))
        psnr = float(quality.psnr(back, levels, (1, 2, 3)).mean())
        board.add_scalar("PSNR", psnr, step)
        pairs = np.stack([levels[:pictured], back[:pictured]], 1).reshape(-1, *levels.shape[1:])
        path = workdir / "tensorboard" / f"reconstructions_{step}.png"
        figures.save_grid(path, pairs, 8)
        tqdm.write(
            f"step {step}: PSNR {psnr:.2f} dB, KL {kl.mean():.1f} nats, means of {len(levels)} test images; some, each "
            f"left of what comes back, in {path}"
        )

    return show


def complete(config: ConfigDict, workdir: pathlib.Path) -> tuple[ConfigDict, dict]:
    """Complete the config of a run in the latents of `latents.autoencoder`; give it and that autoencoder's parameters.

    A new run opens the named one and measures the scale. A run that goes on has them in its folder; UserError where
    the config is a new one, without the autoencoder's arguments, and the named one was replaced since. Other configs
    come back as they are, with no parameters.
    """
    source = config.latents.autoencoder
    if source is None:
        return config, {}
    config = config.copy_and_resolve_references()
    if (workdir / parts.file_of(parts.AUTOENCODER)).exists():
        own = runs.read_config(workdir)
        params = build.autoencoder_params(own, workdir)
        if not config.autoencoder and pathlib.Path(source).expanduser().is_dir():
            _refuse_replaced(runs.open_aid(source, "autoencoder"), checkpoint.identity(params), workdir)
        config.autoencoder = config.autoencoder or own.autoencoder
        config.latents.scale = own.latents.scale if config.latents.scale == 1 else config.latents.scale
        return config, params
    trained = runs.open_aid(source, "autoencoder")
    theirs, fields = trained.values.space.shape, config.data
    if theirs != (fields.image_size, fields.image_size, fields.num_channels):
        side = fields.image_size
        raise UserError(
            f"{source} encodes images of {theirs[0]}x{theirs[1]}x{theirs[2]}, this config's are of "
            f"{side}x{side}x{fields.num_channels}: train one on these, and name it by --config.latents.autoencoder"
        )
    config.autoencoder = ConfigDict({name: value for name, value in trained.config.model.items() if name != "name"})
    if config.latents.scale == 1:
        config.latents.scale = measured_scale(config, trained.params)
    print(f"latents of {trained.name}, times {config.latents.scale:g}")
    return config, trained.params


def measured_scale(config: ConfigDict, params: dict) -> float:
    """1 over the standard deviation of the latents of the first MEASURED training images in random order."""
    images = build.images_of(config, "train", tell=False)
    index = np.arange(min(MEASURED, images.size))
    levels = images.take(data.permutation(0, 0, images.size)[index])["image"]

    @jax.jit
    def encoded(params, keys, levels):
        encode = build.space_of(config, autoencoder=params).encode
        return jax.lax.map(lambda drawn: encode(*drawn), (keys, levels), batch_size=AT_ONCE)

    return float(f"{1 / np.std(encoded(params, samplers.sample_keys(0, index), levels)):.6g}")


def _refuse_replaced(trained: runs.Aid, own: str, workdir: pathlib.Path):
    """Refuse another autoencoder than the one, of identity `own`, in whose latents the run of a folder is trained."""
    if trained.identity != own:
        raise UserError(
            f"{workdir} is trained in the latents of autoencoder {own}, but {trained.workdir} holds {trained.identity} "
            f"by now: choose another --workdir, or go on with its own by python train.py --workdir={workdir}"
        )
