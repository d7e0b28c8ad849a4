"""What is computed in another way on another machine, in the same two functions a file:

    row_state(rows, empty)              the largest logit of each row, and the sum of the other exponentials
    place_label(rows, entries, index)   rows with the entries at their labels set

Another form is another file and a line below. Each is the worst choice on the others' machine (docs/architecture.md).
"""

from typing import Any

from jsoftmax._rows.forms import accelerator, cpu, partitioned
from jsoftmax._rows.platforms import choose

FORMS = {"cpu": cpu, "accelerator": accelerator, "partitioned": partitioned}


def in_form(function: str, implementation: str | None, *operands: Any) -> Any:
    """`function` of the form that suits the machine that the program is compiled for, or of the one that is named."""
    return choose(implementation, *operands, **{name: getattr(form, function) for name, form in FORMS.items()})
