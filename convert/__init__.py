"""Checkpoint conversion: `python -m convert` or `fot-convert`; see `convert/__main__.py`."""
