"""Whether probabilities are what they say: temperatures fitted to labels, calibration errors, Brier's score.

Imports `_losses` and `_rows`. Read `counted_rows.py` first: what all of them look at.
"""
