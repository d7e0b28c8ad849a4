"""What is computed in another way on another machine, in the same functions a file:

    row_state(rows, empty)              the largest logit of each row, and the sum of the other exponentials
    exponentials(z, maximum, exact)     UNIT · e^(z − maximum); `exact` as `Rows.has_exact_differences`
    shares(z, maximum, others, exact)   the probabilities, in units and as they are
    place_label(rows, entries, index)   rows with the entries at their labels set

Another form is another file and a line below. Each is the worst choice on the others' machine (docs/architecture.md).
"""

import functools
from typing import Any

from jsoftmax._rows.forms import cpu, gpu, partitioned, tpu
from jsoftmax._rows.platforms import choose

FORMS = {"cpu": cpu, "partitioned": partitioned, "gpu": gpu, "tpu": tpu}


def in_form(function: str, implementation: str | None, *operands: Any, **known: Any) -> Any:
    """`function` of the form that suits the machine that the program is compiled for, or of the one that is named."""
    forms = {name: functools.partial(getattr(form, function), **known) for name, form in FORMS.items()}
    return choose(implementation, *operands, **forms)
