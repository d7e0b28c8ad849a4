"""Ranks of labels among classes, and the scores that follow: hits@k, reciprocal rank, NDCG@k.

>>> import jax.numpy as jnp
>>> from jsoftmax import ranking
>>> found = ranking.ranks(jnp.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), jnp.array([0, 1]))
>>> print(ranking.hits(found, 1).mean(), ranking.reciprocal_rank(found).mean(), found.mean())  # the last: mean rank
0.5 0.75 1.5
"""

from jsoftmax._blocks.ranking import linear_ranks as linear_ranks
from jsoftmax._losses.ranking import (
    hits as hits,
    ndcg as ndcg,
    ranks as ranks,
    reciprocal_rank as reciprocal_rank,
)
