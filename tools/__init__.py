"""Side doors: python -m tools.import_checkpoint, search, train_features, pack."""
