"""The losses of `_losses` for features and a kernel, a block of rows at a time: no array of all logits.

Imports `_losses` and `_rows`. Read `blockwise.py` first, then how little is left to do in `linear.py`.
"""
