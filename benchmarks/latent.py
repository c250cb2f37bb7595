"""Draw one image by a latent model of Stable Diffusion 1's full size with random weights, beside PyTorch and diffusers.

    pip install torch diffusers transformers
    python -m benchmarks.latent [--size=512] [--steps=5] [--weights=float16] [--folder=FOLDER]

The same files serve both, in processes of their own, one after the other, so that each has its own peak of memory; both
compute in float32. Timed are the evaluations of the guided U-Net by UniPC, of one image, and its decoding; what is
compiled is timed apart. The first evaluation and the image of the same latent are compared. About 8 GB of disk in
--folder, which stays and is used again.
"""

import json
import multiprocessing
import pathlib
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import solvers
from experiments import program
from score_sde import denoiser, guidance, latent_models, latents
from score_sde.sde import DiscreteVP

SIZE = flags.DEFINE_integer("size", 512, "Height and width of the image.", lower_bound=64)
STEPS = flags.DEFINE_integer("steps", 5, "Evaluations.", lower_bound=2)
WEIGHTS = flags.DEFINE_enum("weights", "float16", ["float16", "float32"], "What the files hold.")
FOLDER = program.path_flag("folder", "runs/benchmarks/latent", "Where the files are made.")
SCALE = 7.5


def main():
    folder, shape = pathlib.Path(FOLDER.value) / WEIGHTS.value, (1, SIZE.value // 8, SIZE.value // 8, 4)
    rng = np.random.default_rng(0)
    given = dict(x=rng.normal(size=shape), contexts=rng.normal(size=(2, 77, 768)))
    given = {name: array.astype(np.float32) for name, array in given.items()}
    for work, *arguments in ((make, WEIGHTS.value), (theirs, given, STEPS.value), (ours, given, STEPS.value)):
        process = multiprocessing.get_context("spawn").Process(target=work, args=(folder, *arguments))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)
    rows = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("ours", "theirs")}
    arrays = {name: np.load(folder / f"{name}.npz") for name in rows}
    print(f"One image of {SIZE.value}x{SIZE.value} in {STEPS.value} guided evaluations, weights {WEIGHTS.value}\n")
    print("| | seconds of evaluations | of decoding | of compilation | peak GB |\n|---|---|---|---|---|")
    for row in rows.values():
        print(f"| {row['what']} | {row['draw']:.1f} | {row['decode']:.1f} | {row['compile']:.1f} | {row['peak']:.1f} |")
    for key in ("noise", "image"):
        one, two = (arrays[name][key] for name in rows)
        print(f"\n{key}: the greatest difference is {np.abs(one - two).max() / np.abs(two).max():.1e} of its scale")


def make(folder: pathlib.Path, weights: str):
    """Write a pipeline with random weights as a folder of diffusers, if there is none."""
    import diffusers
    import torch
    import transformers

    if (folder / "model_index.json").exists():
        return
    torch.manual_seed(0)
    widths = (128, 256, 512, 512)
    parts = dict(
        unet=diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        vae=diffusers.AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        ),
        text_encoder=transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
            )
        ),
    )
    for name, part in parts.items():
        part.to(getattr(torch, weights)).save_pretrained(folder / name)
    scheduler(diffusers).save_pretrained(folder / "scheduler")
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(dict(vae=["diffusers", "AutoencoderKL"])))


def scheduler(diffusers):
    """Stable Diffusion's, by UniPC."""
    return diffusers.UniPCMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def theirs(folder: pathlib.Path, given: dict, steps: int):
    """PyTorch's figures and arrays, written to the folder."""
    import diffusers
    import torch

    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    x, contexts = torch.tensor(given["x"]).permute(0, 3, 1, 2), torch.tensor(given["contexts"])
    last = lambda values: values.permute(0, 2, 3, 1).numpy()

    def guided(x, t):
        conditional, unconditional = unet(torch.cat([x, x]), t, contexts).sample.chunk(2)
        return unconditional + SCALE * (conditional - unconditional)

    solver = scheduler(diffusers)
    solver.set_timesteps(steps)
    with torch.no_grad():
        noise, began, sample = guided(x, solver.timesteps[0]), time.perf_counter(), x
        for t in solver.timesteps:
            sample = solver.step(guided(sample, t), t, sample).prev_sample
        drawn = time.perf_counter()
        image = vae.decode(x / 0.18215).sample
        times = dict(draw=drawn - began, decode=time.perf_counter() - drawn, compile=0.0)
    what = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    write(folder / "theirs", what, times, dict(noise=last(noise), image=last(image)))


def ours(folder: pathlib.Path, given: dict, steps: int):
    """This package's figures and arrays, written to the folder."""
    model = latent_models.read(folder)
    sde, unet, (network, weights) = DiscreteVP(**model.sde), model.unet, model.autoencoder
    x, (y, null) = jnp.asarray(given["x"]), (given["contexts"][:1], given["contexts"][1])

    def noise_of(params):
        def conditional(y):
            apply = lambda x, label: unet.network.apply({"params": params}, x, label, y)
            return denoiser.noise_fn(apply, sde, output=model.output, label="node")

        return guidance.classifier_free(conditional, y, null, SCALE)

    first = lambda params, x: noise_of(params)(x, jnp.float32(sde.t_max))
    draw = lambda params, key: solvers.sample(
        noise_of(params), sde, key, x.shape, steps=steps, solver="unipc", order=2, grid="time"
    )
    decode = lambda params, x: latents.decoder(network, params, model.scale)(x)
    began = time.perf_counter()
    params, weights, key = jax.tree.map(jnp.asarray, (unet.params, weights, jax.random.key(0)))
    draw = jax.jit(draw).lower(params, key).compile()
    decode = jax.jit(decode).lower(weights, x).compile()
    compiled = time.perf_counter()
    jax.block_until_ready(draw(params, key))
    drawn = time.perf_counter()
    image = np.asarray(decode(weights, x))
    times = dict(draw=drawn - compiled, decode=time.perf_counter() - drawn, compile=compiled - began)
    peak = peak_gb()
    write(folder / "ours", f"jax {jax.__version__}", times, dict(noise=jax.jit(first)(params, x), image=image), peak)


def peak_gb() -> float:
    """The greatest memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def write(path: pathlib.Path, what: str, times: dict, arrays: dict, peak: float | None = None):
    """Keep what a process found: its figures, with its peak of memory in GB by now if none is given, and its arrays."""
    path.with_suffix(".json").write_text(json.dumps(dict(what=what, **times, peak=peak or peak_gb())))
    np.savez(path.with_suffix(".npz"), **arrays)


if __name__ == "__main__":
    program.run(main)
