"""How good samples are: feature networks, and distances between the features of two sets of images."""
