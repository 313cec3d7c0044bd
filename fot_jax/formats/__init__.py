"""Checkpoint layouts: one table of names each."""
