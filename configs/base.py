"""Every field of a config, with its default and meaning.

The sub-dicts `sde`, `model`, `autoencoder`, `text` and `optim` are constructor arguments. The defaults are those
published for CIFAR-10 with the VP SDE (Song et al. 2021, Appendix H; score_sde's default_cifar10_configs.py). What the
published configs of other data sets and of NCSN share follows below.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import models

# The output and time label that each SDE's published networks are trained with (score_sde/denoiser.py).
SDES = {
    "vp": dict(sde=dict(name="vp", beta_min=0.1, beta_max=20.0, t_min=1e-3), output="eps", label="time"),
    "subvp": dict(sde=dict(name="subvp", beta_min=0.1, beta_max=20.0, t_min=1e-3), output="eps", label="time"),
    "ve": dict(sde=dict(name="ve", sigma_min=0.01, sigma_max=50.0, t_min=1e-5), output="scaled_score", label="sigma"),
    # trained on the num_scales steps of a chain: DDPM and NCSN
    "discrete_vp": dict(
        sde=dict(name="discrete_vp", beta_min=0.1, beta_max=20.0, t_min=1e-3), output="eps", label="index"
    ),
    "discrete_ve": dict(
        sde=dict(name="ve", sigma_min=0.01, sigma_max=50.0, t_min=1e-5), output="scaled_score", label="reversed_index"
    ),
    "flow": dict(sde=dict(name="flow", t_min=1e-3), output="flow", label="time"),
    "edm": dict(sde=dict(name="edm", t_min=2e-3, t_max=80.0), output="edm", label="edm"),
    # guided diffusion's chain as DPM-Solver has it, its first node at 1 / 1000; and the cosine one of ADM at 64x64
    "adm": dict(
        sde=dict(name="discrete_vp", beta_min=0.1, beta_max=20.0, t_first=1e-3, t_min=1e-3), output="eps", label="node"
    ),
    "adm_cosine": dict(sde=dict(name="cosine_vp", t_min=1e-3), output="eps", label="node"),
}


def get_config(sde: str = "vp", *, num_scales: int = 1000) -> ConfigDict:
    """Every default, for one of SDES and that many noise levels."""
    exploding = SDES[sde]["sde"]["name"] == "ve"
    config = ConfigDict()
    config.seed = 42

    config.data = data = ConfigDict()
    data.dataset = "cifar10"  # "digits", a tensorflow-datasets name, or a path (docs/use.md has the table of readers)
    data.data_dir = placeholder(str)  # where tensorflow-datasets keeps its data; None: its own default
    data.image_size = 32
    data.num_channels = 3
    data.crop = placeholder(int)  # side of a central crop before resizing
    data.resize = "none"  # "none", "pad", "crop_resize" or "resize_crop" (score_sde/sources/)
    data.skip_damaged = False  # in the place of a damaged image put the next that is whole, and count
    data.centered = not exploding  # data range [-1, 1] instead of [0, 1]
    data.random_flip = True
    data.uniform_dequantization = False

    config.sde = ConfigDict(SDES[sde]["sde"])  # arguments of the SDE `name`; t_min: where sampling ends
    if sde == "discrete_vp":
        config.sde.n = num_scales

    config.denoiser = denoiser = ConfigDict()
    denoiser.output = SDES[sde]["output"]  # what the network predicts: a key of denoiser.PARAMETERIZATIONS
    denoiser.label = SDES[sde]["label"]  # what it is told of the time: a key of denoiser.LABELS
    denoiser.num_scales = num_scales  # noise levels of a network trained on a discrete chain
    denoiser.sigma_data = 0.5  # standard deviation of the data, of which the output "edm" alone makes use

    config.model = models.ddpmpp()  # arguments of the network `name`

    config.latents = latents = ConfigDict()
    latents.autoencoder = placeholder(str)  # the run of one that is copied into a new run, to be trained in its latents
    latents.scale = 1.0  # what the network sees are the latents times this; a new run measures it where it is 1
    latents.classes = 0  # of a network whose context is a row of a table, one a class and a last one for none of them
    config.autoencoder = ConfigDict()  # arguments of the one whose latents the network sees; empty: it sees pixels
    config.text = ConfigDict()  # arguments of the text encoder that makes the network's context; empty: it has none

    config.training = training = ConfigDict()
    training.batch_size = 128  # over all devices
    training.n_iters = 1_300_000
    training.cooldown = 0  # the last so many of them, during which the learning rate falls to nothing
    training.init = placeholder(str)  # a run or packed model whose averaged parameters it starts from; None: from seed
    training.times = "chain" if sde.startswith("discrete") else "uniform"  # how drawn: a key of losses.TIMES
    training.t_min = 1e-5  # smallest time trained at, but for those of a chain
    training.lam_normal = (1.2, 1.2)  # mean and deviation of lam for times "lam_normal"; these are EDM's
    training.weight = "eps"  # whose error counts: a key of losses.WEIGHTS, as "network", the network's own
    training.reduce_mean = not exploding  # mean over pixels, or half of the sum
    training.label_dropout = 0.0  # share of labels hidden from a class-conditional network, which can then be guided
    training.kl_weight = 1e-6  # of the KL divergence in an autoencoder's loss
    training.augment = 0.0  # probability of each augmentation that the network is told of (score_sde/augmentation.py)
    training.ema_rate = 0.999 if exploding else 0.9999
    training.ema_warmup = False  # ramp the rate up from 0, as the official PyTorch code does
    training.power_ema = ()  # relative widths of further averages, of which tools.ema makes any; EDM2's are (0.05, 0.1)
    training.accumulate = 1  # slices of a device's batch that pass the network one after another, to save memory
    training.non_finite = "stop"  # before a batch whose loss or gradient is not finite; or "skip" it and count
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
    sampling.pc_steps = num_scales  # of the predictor-corrector sampler
    sampling.predictor = "reverse_diffusion"  # or "euler_maruyama", "ancestral_sampling", "none"
    sampling.corrector = "langevin" if exploding else "none"  # or "ald", annealed Langevin dynamics
    sampling.corrector_steps = 1
    sampling.snr = 0.16
    sampling.probability_flow = False
    sampling.denoise = True

    config.ems = ems = ConfigDict()
    ems.nodes = 120  # intervals of lam; the paper takes 1200, which brings little (docs/studies.md)
    ems.num_data = 1024  # images; the paper takes 4096
    ems.batch_size = 64
    ems.own_steps = 50  # evaluations of DPM-Solver++ for each of the model's own samples, where they are measured on
    # where they end, if not at the SDE's t_min; a tenth of it serves what is published above 10 steps
    ems.t_end = placeholder(float)

    config.eval = evaluation = ConfigDict()
    evaluation.num_data = 10_000  # test images of the loss
    evaluation.batch_size = 128
    evaluation.num_samples = 64  # noises of the convergence study
    evaluation.steps = (5, 6, 8, 10, 15, 20)
    evaluation.fine_steps = 400  # of the solution that the others are compared with
    evaluation.likelihood = likelihood = ConfigDict()
    likelihood.num_data = 10_000  # test images of bits/dim
    likelihood.repeats = 5  # draws of dequantization and probes for each
    likelihood.probe = "rademacher"  # or "gaussian", or "exact": the whole trace, for small images
    likelihood.num_probes = 1
    likelihood.t_min = 1e-5  # the density is that of data with the noise of this time
    likelihood.rtol = 1e-5
    likelihood.atol = 1e-5
    return config.lock()


def celeba(*, num_scales: int = 1000) -> ConfigDict:
    """CelebA at 64x64, for NCSN's chain (score_sde's default_celeba_configs.py)."""
    config = get_config("discrete_ve", num_scales=num_scales)
    config.data.dataset = "celeb_a"
    config.data.image_size = 64
    config.data.crop = 140
    config.data.resize = "resize_crop"
    config.sde.sigma_max = 90.0
    config.sampling.snr = 0.17
    return config


def large(dataset: str, sde: str, *, num_scales: int) -> ConfigDict:
    """LSUN, CelebA-HQ or FFHQ at 256x256 (score_sde's default_lsun_configs.py)."""
    config = get_config(sde, num_scales=num_scales)
    config.data.dataset = dataset
    config.data.image_size = 256
    config.data.resize = "crop_resize" if dataset.startswith("lsun/") else "none"
    config.training.batch_size = 64
    config.training.n_iters = 2_400_000
    config.training.checkpoint_freq = 5000
    config.sampling.snr = 0.075
    return config


def faces_1024(dataset: str) -> ConfigDict:
    """CelebA-HQ or FFHQ at 1024x1024 with the VE SDE."""
    config = large(dataset, "ve", num_scales=2000)
    config.data.image_size = 1024
    config.sde.sigma_max = 1348.0
    config.model = models.ncsnpp_1024()
    config.training.batch_size = 8
    config.training.ema_rate = 0.9999
    config.sampling.snr = 0.15
    return config


def ncsn(config: ConfigDict) -> ConfigDict:
    """NCSN's network, in place: its normalizations know each noise level, and it outputs the score undivided."""
    config.model = models.ncsn(num_scales=config.denoiser.num_scales)
    config.denoiser.output = "score"
    return config


def annealed_langevin(config: ConfigDict, *, lr: float, snr: float, corrector_steps: int) -> ConfigDict:
    """NCSN's ways, in place: Adam without warmup or clipping, and Langevin dynamics alone at each noise level."""
    config.optim.lr = lr
    config.optim.warmup = 0
    config.optim.grad_clip = -1.0
    config.sampling.predictor = "none"
    config.sampling.corrector = "ald"
    config.sampling.snr = snr
    config.sampling.corrector_steps = corrector_steps
    return config


def edm(
    dataset: str, image_size: int, *, batch_size: int, lr: float, augment: float, millions: int = 200
) -> ConfigDict:
    """EDM's training on so many million images (Karras et al. 2022, Table 7).

    The average forgets half in half a million images (50 of ImageNet's 2500), the rate of learning rises over ten.
    """
    config = get_config("edm")
    config.data.dataset = dataset
    config.data.image_size = image_size
    config.training.batch_size = batch_size
    config.training.n_iters = round(millions * 1e6 / batch_size)
    config.training.times = "lam_normal"
    config.training.weight = "network"
    config.training.augment = augment
    config.data.random_flip = not augment  # which has flips of its own
    config.training.ema_rate = 0.5 ** (batch_size / (50e6 if millions > 1000 else 0.5e6))
    config.optim.lr = lr
    config.optim.warmup = round(10e6 / batch_size)
    config.optim.grad_clip = -1.0
    return config


def adm(image_size: int, sde: str = "adm", *, dataset: str = "imagenet") -> ConfigDict:
    """Guided diffusion's data and chain; its loss of variances is not here, so that its files are for sampling."""
    config = get_config(sde)
    config.data.dataset = dataset
    config.data.image_size = image_size
    config.training.batch_size = 256
    config.optim.lr = 1e-4
    config.optim.warmup = 0
    config.optim.grad_clip = -1.0
    return config
