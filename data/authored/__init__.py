"""Phrases written for this repository, one module per subject; `build_dialogues.py` turns them into dialogues."""
