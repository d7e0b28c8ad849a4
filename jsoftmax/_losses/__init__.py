"""From the numbers of a row to losses, activations and divergences on logits; every option of losses, once.

Imports `_rows`. Read `row_losses.py` first: the public functions are a line or two on it.
"""
