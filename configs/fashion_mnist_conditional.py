"""Fashion-MNIST by class: the network of configs/fashion_mnist.py, told which garment.

    python train.py --config=configs/fashion_mnist_conditional.py
    python sample.py --label=7 --guidance=2.0

1.4 M parameters; an earlier network was trained here for 2359 steps only (docs/studies.md), so no number to expect.
"""

from configs import fashion_mnist


def get_config():
    config = fashion_mnist.get_config()
    config.model.num_classes = 10
    config.training.label_dropout = 0.1
    return config
