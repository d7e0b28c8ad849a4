"""Losses over very many classes that look at few of them: sampled, in-batch, adaptive, hierarchical.

Imports `_blocks`, `_losses` and `_rows`. Read `sampled.py` first; the distributions it draws from are in `samplers.py`.
"""
