"""One row of logits, exactly: its state, its probabilities, the numbers that losses are made of, their one derivative.

Imports no other wing. What depends on the machine is in `forms`. Read `state.py` first, then `statistics.py`.
"""
