"""What the optimised program of a CPU holds, reads and repeats: the same on every run, unlike its time.

A slower or hungrier engine changes one of these counts. Others are beside what they belong to: what waits for the
backward pass in test_transformations.py, products and blocks in test_linear.py, what is sent in test_sharding.py, the
length of attention in test_attention.py.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

import jsoftmax
from jsoftmax._rows.exponentials import exponentials
from jsoftmax._rows.forms import cpu

pytestmark = pytest.mark.exact

ROWS, CLASSES = 256, 32_768
LOGITS = re.compile(rf"\w+\[{ROWS},{CLASSES}\]")
INSTRUCTION = re.compile(r"^  (?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(.*)$", re.MULTILINE)
FREE = {"parameter", "tuple", "get-tuple-element", "bitcast"}
# Sums of blocks, one block of each row and other numbers per row, in bytes.
PER_ROW = 2e6

integer = jsoftmax.softmax_cross_entropy_with_integer_labels
# The loss, and how many arrays as large as the logits it keeps beside its results: in float32, in bfloat16.
LOSSES = {
    "integer": (integer, 0, 0),
    "integer, jvp": (functools.partial(integer, derivative="jvp"), 0, 0),
    "temperature": (functools.partial(integer, temperature=2.0), 0, 2),
    "soft cap": (functools.partial(integer, softcap=30.0), 1, 4),
    "smoothed, z-loss": (functools.partial(integer, label_smoothing=0.1, z_loss=1e-4), 1, 2),
    "focal": (jsoftmax.softmax_focal_loss, 0, 0),
    "poly": (jsoftmax.poly_loss_cross_entropy, 0, 0),
}
ACTIVATIONS = {"softmax": (1, 2), "log_softmax": (0, 2), "logsumexp": (0, 0)}

as_of_jax_0_10 = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="XLA copies bfloat16 logits more often before JAX 0.10"
)
both_dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


def compiled(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()


@functools.cache
def loss_program(name, dtype, gradient=True):
    loss = LOSSES[name][0]

    def mean(logits, labels):
        return loss(logits, labels).mean()

    return compiled(jax.value_and_grad(mean) if gradient else mean, ((ROWS, CLASSES), dtype), ((ROWS,), jnp.int32))


@functools.cache
def activation_program(name, dtype, gradient):
    function = getattr(jsoftmax, name)

    def pulled_back(logits, weights):
        return jax.vjp(function, logits)[1](weights)[0]

    if not gradient:
        return compiled(function, ((ROWS, CLASSES), dtype))
    result = (ROWS,) if name == "logsumexp" else (ROWS, CLASSES)
    return compiled(pulled_back, ((ROWS, CLASSES), dtype), (result, dtype))


def copies(program, dtype):
    """Of the logits, in temporary memory, beyond a few numbers a row."""
    bytes_ = program.memory_analysis().temp_size_in_bytes
    return max(0.0, bytes_ - PER_ROW) / (ROWS * CLASSES * jnp.dtype(dtype).itemsize)


def passes(program):
    """How many steps of the program go over an array of the logits' shape, whatever its dtype.

    One that gathers or scatters only looks at some of its entries.
    """
    text = program.as_text()
    bodies = dict(re.findall(r"^%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    entry = re.search(r"^ENTRY .*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL).group(1)
    large, count = set(), 0
    for name, type_, operation, operands, rest in INSTRUCTION.findall(entry):
        if LOGITS.match(type_):
            large.add(name)
        called = re.search(r"(?:calls|to_apply)=%([\w.\-]+)", rest)
        body = bodies[called.group(1)] if called else operation + "("
        sparse = re.search(r"\b(?:gather|scatter)\(", body)
        if operation not in FREE and not sparse and large & set(re.findall(r"%([\w.\-]+)", operands)):
            count += 1
    return count


@as_of_jax_0_10
@both_dtypes
@pytest.mark.parametrize("name", LOSSES)
def test_memory_of_value_and_gradient(name, dtype):
    """Beside the gradient: nothing as large as the logits. Exponentials in float32 take the place of its gradient.

    For one in bfloat16 they are computed again, of what a transformation makes of the logits, which is in float32. A
    soft cap keeps its slope as well, a mean log-probability has an array of its own.
    """
    assert copies(loss_program(name, dtype), dtype) <= LOSSES[name][1 if dtype == jnp.float32 else 2]


@as_of_jax_0_10
@both_dtypes
def test_memory_of_the_value_alone(dtype):
    """Nothing but what the caches hold."""
    held = loss_program("integer", dtype, gradient=False).memory_analysis().temp_size_in_bytes
    assert held <= cpu.CACHED + PER_ROW


@as_of_jax_0_10
@both_dtypes
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_memory_of_activations(name, dtype):
    """Beside the result: nothing, or what the caches hold. Beside the gradient: that of softmax keeps the result.

    Exponentials in float32 take the place of a result in float32.
    """
    alone = activation_program(name, dtype, gradient=False).memory_analysis().temp_size_in_bytes
    assert alone <= (cpu.CACHED if name == "logsumexp" else 0) + PER_ROW
    allowed = ACTIVATIONS[name][0 if dtype == jnp.float32 else 1]
    assert copies(activation_program(name, dtype, gradient=True), dtype) <= allowed


@pytest.mark.parametrize(
    ("dtype", "gradient", "most"),
    [
        (jnp.float32, False, 1),  # the maximum, before the loop
        (jnp.float32, True, 4),  # the maximum; exponentials; their sums; and the gradient
        (jnp.bfloat16, False, 1 if cpu.HAS_LIBRARY else 2),  # before JAX 0.10, and a copy in float32
        (jnp.bfloat16, True, 2 if cpu.HAS_LIBRARY else 3),  # the maximum, before the loop; the gradient behind it
    ],
)
def test_passes_over_the_logits(dtype, gradient, most):
    """Beside a loop over parts that fit the caches, which reads the logits once for exponentials and their sums."""
    program = loss_program("integer", dtype, gradient)
    assert 0 < passes(program) <= most
    keeps_exponentials = gradient and dtype == jnp.float32
    assert (" while(" in program.as_text()) != keeps_exponentials


@pytest.mark.parametrize(("dtype", "gradient", "most"), [(jnp.float32, False, 3.2), (jnp.float32, True, 8.3)])
def test_bytes_accessed(dtype, gradient, most):
    """In copies of the logits, by XLA's own count, which takes a gather for the whole of its operand, and a loop once.

    A maximum and two gathers, of which one is the label's; with the gradient, exponentials, their sums, and one pass
    that reads and writes.
    """
    cost = loss_program("integer", dtype, gradient).cost_analysis()
    assert cost["bytes accessed"] <= most * ROWS * CLASSES * jnp.dtype(dtype).itemsize


def test_rule_for_reverse_mode_alone_is_the_leaner():
    """What `derivative="vjp"` saves, and why it is the default: in float32, the second time of each exponential."""
    default, every_mode = (
        loss_program(name, jnp.float32).cost_analysis()["flops"] for name in ("integer", "integer, jvp")
    )
    assert default < 0.6 * every_mode


@pytest.mark.parametrize("gradient", [False, True])
def test_one_exponential_per_logit(gradient):
    """Forwards and backwards together: the gradient's are the sum's. It is ordinary arithmetic to XLA."""
    one = compiled(exponentials, ((ROWS, CLASSES), jnp.float32), ((ROWS, 1), jnp.float32)).cost_analysis()["flops"]
    assert one > 20 * ROWS * CLASSES
    assert loss_program("integer", jnp.float32, gradient).cost_analysis()["flops"] < 1.5 * one


def test_few_classes_write_no_exponentials():
    """A value alone holds a few numbers a row, fewer than half of the ten."""
    rows = 65_536
    program = compiled(lambda z, y: integer(z, y).mean(), ((rows, 10), jnp.float32), ((rows,), jnp.int32))
    assert program.memory_analysis().temp_size_in_bytes < 5 * 4 * rows


def test_a_gradient_in_bfloat16_is_rounded_in_integers():
    """XLA's own conversion takes five times as long, and is part of a choice between floats of 16 bits.

    None of them is asked whether it is NaN, and labels are compared in float32: LLVM would compare integers in 64 bits.
    """
    text = loss_program("integer", jnp.bfloat16).as_text()
    assert LOGITS.search(text)
    assert not re.search(rf"bf16\[{ROWS},{CLASSES}\]\S* convert\(", text)
    comparisons = re.findall(rf"pred\[{ROWS},{CLASSES}\]\S* compare\(.*direction=(\w+)", text)
    assert "EQ" in comparisons
    assert "NE" not in comparisons
    assert re.search(rf"f32\[({ROWS},)?{CLASSES}\]\S* (convert\(%iota|iota\()", text)


def test_few_classes_are_added_once():
    """For the logarithm and two quotients of their sum, each of which could add them for itself."""
    rows, classes = 65_536, 10
    one = compiled(exponentials, ((rows, classes), jnp.float32), ((rows, 1), jnp.float32)).cost_analysis()["flops"]
    program = compiled(
        jax.value_and_grad(lambda z, y: integer(z, y).mean()), ((rows, classes), jnp.float32), ((rows,), jnp.int32)
    )
    assert program.cost_analysis()["flops"] < 1.5 * one


# Without the library, sums of up to 32 blocks take more.
@pytest.mark.parametrize(("classes", "operations"), [(10, 430), (1000, 370 if cpu.HAS_LIBRARY else 405), (32_000, 370)])
def test_size_of_the_program(classes, operations):
    """What is traced and compiled for value and gradient, which everyone waits for: one form, whatever the classes.

    So many operations go into XLA, more where classes are added one by one, and 18 steps come out, of which half are a
    few numbers a row.
    """
    program = jax.jit(jax.value_and_grad(lambda logits, labels: integer(logits, labels).mean()))
    lowered = program.lower(
        jax.ShapeDtypeStruct((8192, classes), jnp.float32), jax.ShapeDtypeStruct((8192,), jnp.int32)
    )
    text = lowered.as_text()
    assert "stablehlo.case" not in text
    assert 100 < len(re.findall(r" = \"?stablehlo\.", text)) <= operations
    entry = re.search(r"^ENTRY .*?\{\n(.*?)^\}", lowered.compile().as_text(), re.MULTILINE | re.DOTALL).group(1)
    steps = [name for name, _, operation, _, _ in INSTRUCTION.findall(entry) if operation not in FREE | {"constant"}]
    assert 10 < len(steps) <= (18 if cpu.HAS_LIBRARY else 24)


def test_blocks_read_the_kernel_in_its_own_dtype():
    """No float32 copy of a bfloat16 kernel waits outside the loop over blocks; its gradient's sum is the only one."""
    shapes = ((64, 16), jnp.bfloat16), ((16, 1000), jnp.bfloat16), ((64,), jnp.int32)
    loss = functools.partial(jsoftmax.linear_softmax_cross_entropy, block_size=16)
    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(*(jnp.zeros(*shape) for shape in shapes))
    loops = [equation for equation in equations(jaxpr.jaxpr) if equation.primitive.name == "scan"]
    assert len(loops) == 1
    kernels = [v.aval.dtype for v in loops[0].invars if v.aval.shape == (16, 1000)]
    assert sorted(map(str, kernels)) == ["bfloat16", "float32"]


def equations(jaxpr):
    """Those of a jaxpr and of the functions that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_what_is_counted_is_there():
    """The counts above, of programs that are known to hold and to read the logits so many times."""
    logits = (ROWS, CLASSES), jnp.float32
    total = compiled(lambda z: jnp.sum(z, axis=-1), logits)
    assert passes(total) == 1
    assert copies(total, jnp.float32) == 0
    twice = compiled(lambda z: (jnp.exp(z), jnp.max(z, axis=-1)), logits)
    assert passes(twice) == 2
    kept = compiled(lambda z: jnp.sort(z, axis=-1)[:, 5] + jnp.sort(-z, axis=-1)[:, 7], logits)
    assert copies(kept, jnp.float32) > 0.9
    assert passes(compiled(lambda z: z[:, :5], logits)) == 1
    taken = compiled(lambda z, y: jnp.take_along_axis(z, y[:, None], axis=-1), logits, ((ROWS,), jnp.int32))
    assert passes(taken) == 0
