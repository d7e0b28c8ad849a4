"""Softmax of products of queries and keys, as weights of values; plain, or block by block.

Imports `_losses` and `_rows`. Read `attention.py` first, then `blockwise.py`.
"""
