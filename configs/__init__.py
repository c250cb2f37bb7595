"""Configs: read by the programs alone. base.py holds every default once; each other file only what differs."""
