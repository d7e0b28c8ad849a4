"""Categorical distributions given by logits: draws, filters of draws, log-probabilities, entropy, divergence.

>>> import jax, jax.numpy as jnp
>>> from jsoftmax import categorical
>>> logits = jnp.array([2.0, 1.0, 0.1, -3.0])
>>> action = categorical.sample(jax.random.key(0), logits, top_p=0.9)
>>> print(f"{categorical.log_prob(logits, action, top_p=0.9):.3f}")
-2.317
"""

from jsoftmax._policies.distributions import (
    entropy as entropy,
    kl_divergence as kl_divergence,
    log_prob as log_prob,
)
from jsoftmax._policies.sampling import (
    filter_classes as filter_classes,
    sample as sample,
    sample_without_replacement as sample_without_replacement,
)
