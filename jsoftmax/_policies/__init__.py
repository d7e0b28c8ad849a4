"""Softmax as a policy: distributions of actions, draws and their filters, losses of policies and preferences.

Imports `_losses` and `_rows`. Read `policy_gradient.py` first; what its relatives share is in `actions.py`.
"""
