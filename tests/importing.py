"""What importing the library does to a process, printed as JSON. It runs alone, in a process with no device to find.

JAX_PLATFORMS=nowhere python tests/importing.py
"""

import json
import time

import jax
import jax.numpy as jnp

settings = dict(jax.config.values)
start = time.process_time()
import jsoftmax  # noqa: E402

seconds = time.process_time() - start  # of the processor: what else a machine does meanwhile is not counted
changed = sorted(name for name, value in jax.config.values.items() if settings.get(name, "none") != value)
try:
    jnp.zeros(1)
    found_device = True
except RuntimeError:
    found_device = False  # so that an import which had looked for one would have failed as well
print(json.dumps({"seconds": seconds, "changed": changed, "found_device": found_device, "file": jsoftmax.__file__}))
