"""Published latent models as run folders: a config that names all their parts, and a file for each of these."""

import dataclasses
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import base
from experiments import build, parts, runs
from score_sde import checkpoint, files, latents, tokenizer, training
from score_sde.errors import UserError
from score_sde.latent_models import LatentModel, Part

SIZES = {"v": 96}  # of latents where a file does not tell; others are 64 high and wide


def config_of(model: LatentModel) -> ConfigDict:
    """The config of a run of this model: everything about its parts but their parameters."""
    config = base.get_config("adm")
    first = model.autoencoder.network
    config.data.dataset = ""
    config.data.image_size = (model.size or SIZES.get(model.output, 64)) * first.factor
    config.data.num_channels = first.channels
    config.data.random_flip = False
    config.sde = ConfigDict(dict(name="discrete_vp", **model.sde))
    config.denoiser.output = model.output
    config.denoiser.num_scales = model.sde["n"]
    config.model = ConfigDict(dict(name="unet", **_arguments(model.unet)))
    config.latents.scale = model.scale
    config.latents.classes = 0 if model.classes is None else len(model.classes) - 1
    config.autoencoder = ConfigDict(_arguments(model.autoencoder))
    config.text = ConfigDict({} if model.text is None else _arguments(model.text))
    config.sampling.num_samples = config.sampling.batch_size = 8
    config.sampling.pc_steps = model.sde["n"]
    # as published for Stable Diffusion, and for models without a condition (Zheng et al. 2023, appendix)
    config.ems.update(nodes=250 if model.text else 120, batch_size=8, own_steps=200)
    return config


def _arguments(part: Part) -> dict:
    """The arguments that the network was made with, flax's own fields apart."""
    names = [field.name for field in dataclasses.fields(part.network) if field.name not in ("parent", "name")]
    return {name: getattr(part.network, name) for name in names}


def write(model: LatentModel, workdir: pathlib.Path, source: str):
    """Write the run folder of a model, all of it or nothing; source: the file or folder that it was read from."""
    config = config_of(model)
    if model.text is not None:
        if model.tokenizer is None:
            raise UserError(f"{source} has no tokenizer: name the folder with its vocab.json and merges.txt by --clip")
        latents.require_fit(model.text.network, tokenizer.read(model.tokenizer))
    with runs.whole_or_nothing(workdir, config) as checkpoints:
        parts.save(workdir, parts.AUTOENCODER, model.autoencoder.params)
        if model.text is not None:
            parts.save(workdir, parts.TEXT, model.text.params)
            for name in tokenizer.FILES:
                if (model.tokenizer / name).is_file():
                    files.write(workdir / parts.TOKENIZER / name, (model.tokenizer / name).read_bytes())
        if model.classes is not None:
            parts.save(workdir, parts.CLASSES, {"table": model.classes})
        init = build.diffusion_of(runs.read_config(workdir), workdir).init
        layout = checkpoint.layout(jax.eval_shape(init, jax.random.key(0)))
        checkpoint.check_fit(source, "network", layout, checkpoint.layout(model.unet.params))
        # the averaged parameters alone: what a run is opened, and another started, with
        checkpoints.save(training.State(np.int32(0), {}, model.unet.params, {}), {"imported": str(source)})
