"""Offline CoPG training on completions with rewards; the entry point is `train/run.py`."""
