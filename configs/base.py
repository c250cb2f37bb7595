"""Every field of a config, with its default and meaning.

The sub-dicts `sde`, `model` and `optim` are constructor arguments. The defaults are the published ones for CIFAR-10
with the VP SDE (Song et al. 2021, Appendix H; score_sde's default_cifar10_configs.py).
"""

from ml_collections import ConfigDict

from configs import models

# The time label and output that each SDE's published networks are trained with (score_sde/denoiser.py).
SDES = {
    "vp": dict(sde=dict(name="vp", beta_min=0.1, beta_max=20.0, t_min=1e-3), output="eps", label="time"),
    "subvp": dict(sde=dict(name="subvp", beta_min=0.1, beta_max=20.0, t_min=1e-3), output="eps", label="time"),
    "ve": dict(sde=dict(name="ve", sigma_min=0.01, sigma_max=50.0, t_min=1e-5), output="score", label="sigma"),
}


def get_config(sde: str = "vp") -> ConfigDict:
    """Every default, for one of SDES."""
    config = ConfigDict()
    config.seed = 42

    config.data = data = ConfigDict()
    data.dataset = "cifar10"  # "digits", a tensorflow-datasets name, an .npz, an IDX file or folder, a folder of images
    data.data_dir = None  # where tensorflow-datasets keeps its data; None: its own default
    data.image_size = 32
    data.num_channels = 3
    data.crop = None  # side of a central crop before resizing
    data.resize = "none"  # "none", "pad", "crop_resize" or "resize_crop" (score_sde/data.py)
    data.centered = sde != "ve"  # data range [-1, 1] instead of [0, 1]
    data.random_flip = True
    data.uniform_dequantization = False

    config.sde = ConfigDict(SDES[sde]["sde"])  # arguments of the SDE `name`; t_min: where sampling ends

    config.denoiser = denoiser = ConfigDict()
    denoiser.output = SDES[sde]["output"]  # what the network predicts: "eps", "score", "x0" or "v"
    denoiser.label = SDES[sde]["label"]  # what it is told of the time: "time", "sigma", "index" or "reversed_index"
    denoiser.num_scales = 1000  # noise levels of a network trained on a discrete chain

    config.model = models.ddpmpp()  # arguments of the network `name`

    config.training = training = ConfigDict()
    training.batch_size = 128  # over all devices
    training.n_iters = 1_300_000
    training.continuous = True  # times from a continuum, or from the num_scales nodes of a chain
    training.t_min = 1e-5  # smallest time trained at
    training.likelihood_weighting = False
    training.reduce_mean = sde != "ve"  # mean over pixels, or half of the sum
    training.ema_rate = 0.999 if sde == "ve" else 0.9999
    training.ema_warmup = False  # ramp the rate up from 0, as the official PyTorch code does
    training.steps_per_call = 1  # more save dispatch on GPU and TPU; on CPU a loop makes steps 20 times slower
    training.log_freq = 50
    training.eval_freq = 100
    training.checkpoint_freq = 10_000
    training.keep_freq = 50_000  # checkpoints at multiples are kept for good, with a grid of samples

    config.optim = optim = ConfigDict()  # Adam
    optim.lr = 2e-4
    optim.beta1 = 0.9
    optim.eps = 1e-8
    optim.weight_decay = 0.0
    optim.warmup = 5000
    optim.grad_clip = 1.0  # global norm; negative: no clipping

    config.sampling = sampling = ConfigDict()
    sampling.solver = "dpmv3"
    sampling.steps = 10
    sampling.num_samples = 64
    sampling.batch_size = 64
    sampling.pc_steps = 1000  # of the predictor-corrector sampler
    sampling.predictor = "reverse_diffusion"
    sampling.corrector = "langevin" if sde == "ve" else "none"
    sampling.corrector_steps = 1
    sampling.snr = 0.16
    sampling.probability_flow = False
    sampling.denoise = True

    config.ems = ems = ConfigDict()
    ems.nodes = 120  # intervals of lam; the paper takes 1200
    ems.num_data = 1024  # images; the paper takes 4096
    ems.batch_size = 64

    config.eval = evaluation = ConfigDict()
    evaluation.num_data = 10_000  # test images of the loss
    evaluation.batch_size = 128
    evaluation.num_samples = 64  # noises of the convergence study
    evaluation.steps = (5, 6, 8, 10, 15, 20)
    evaluation.fine_steps = 400  # of the solution that the others are compared with
    return config.lock()
