"""Models in the box: averaged parameters in half precision with their EMS, each with a card, by `tools.pack`."""
