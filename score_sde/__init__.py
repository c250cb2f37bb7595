"""Score models: the SDE, the network, the loss and the training step."""

VERSION = "0.1.0"
