"""A noise-conditional classifier of digits 8x8, which guides the model of configs/digits.py towards a class.

    python train.py --workdir=runs/classifier_digits --config=configs/classifier/digits.py
    python sample.py --task=class --label=3 --guidance=3 --classifier=runs/classifier_digits

0.5 M parameters. A minute on two CPU cores. Expect 0.98 of the test images right at t = 0.001, 0.9 at 0.2, 0.4 at
0.4, and chance from 0.8 on, where nothing is left to see.
"""

from ml_collections import ConfigDict

from configs import digits


def get_config():
    config = digits.get_config()
    config.unlock()
    config.model = ConfigDict(
        dict(
            name="wide_resnet",
            blocks_per_group=1,
            channel_multiplier=1,
            num_outputs=10,
            mean=(-0.39,),  # of the pixels in [-1, 1]
            std=(0.75,),
            fourier_scale=0.3,  # smooth in log sigma, which spans ten
        )
    )
    config.training.n_iters = 2000
    config.training.keep_freq = 2000
    config.optim.weight_decay = 0.05
    return config.lock()
