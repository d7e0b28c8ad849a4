"""The documentation keeps up with the code: names, examples, their outputs, and links."""

import ast
import contextlib
import doctest
import importlib
import inspect
import io
import pkgutil
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsoftmax
import jsoftmax.plots
import jsoftmax.testing

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BUILT = (DOCS / "_build", DOCS / "jupyter_execute")
PAGES = [ROOT / "README.md", *sorted(set(DOCS.rglob("*.md")).difference(*(folder.rglob("*") for folder in BUILT)))]
CHINESE = sorted((DOCS / "zh").glob("*.md"))
# Run as a reader would, with JAX's own settings: optax and flax mix dtypes and ranks.
RELAXED = {
    "README.md",
    "docs/faq.md",
    "docs/from-pytorch.md",
    "docs/getting-started.md",
    "docs/how-to-choose.md",
    "docs/migrating.md",
    "docs/trainers.md",
}
# Pages that train, measure or take long for another reason: they run in the long form.
SLOW = {"attention", "calibration", "corrections", "distillation", "from-pytorch", "large-vocabularies"}
SLOW |= {"linear", "log-probabilities", "policies", "post-training", "recommending", "retrieval"}
SLOW |= {"scaling-out", "trainers"}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r"^\$\$\n(.*?)^\$\$$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^]]+\]\(([^)\s]+)\)")
MODULES = [module.name for module in pkgutil.walk_packages(jsoftmax.__path__, "jsoftmax.")]


def within(page):
    """Its path in the repository, with slashes on every system."""
    return page.relative_to(ROOT).as_posix()


by_page = pytest.mark.parametrize("page", PAGES, ids=within)


LISTS = (jsoftmax, jsoftmax.categorical, jsoftmax.ranking)


def public_names(module):
    """What a module imports on purpose (jsoftmax, and its lists of names), or defines (the others)."""
    for name, value in vars(module).items():
        own = module in LISTS or getattr(value, "__module__", None) == module.__name__
        if own and not name.startswith("_") and not inspect.ismodule(value):
            yield f"{module.__name__}.{name}"


NAMES = [name for module in (*LISTS, jsoftmax.plots, jsoftmax.testing) for name in public_names(module)]


@pytest.fixture
def own_print_options():
    """Pages and doctests set how arrays print; what they set ends with them."""
    before = np.get_printoptions()
    np.set_printoptions(precision=8, suppress=False)
    yield
    np.set_printoptions(**before)


@pytest.mark.parametrize("name", NAMES)
def test_public_name_is_documented(name):
    """By a directive of its own on the API page, and with a docstring for it to show."""
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    assert re.search(rf"^\.\. auto\w+:: {re.escape(name)}(\(\))?$", text, re.MULTILINE)
    module, _, attribute = name.rpartition(".")
    assert inspect.getdoc(getattr(importlib.import_module(module), attribute))


def test_api_page_names_what_exists():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\.\. auto(?:function|class):: ([\w.]+)", text, re.MULTILINE)
    assert sorted(documented) == sorted(NAMES)


# A Chinese page holds the program of its original, which is compared below.
@pytest.mark.optimized  # some pages print eight digits, or count bytes
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] * (page.stem in SLOW), id=within(page))
        for page in PAGES
        if page not in CHINESE
    ],
)
def test_code_runs_and_prints_what_it_says(page, own_print_options):
    """From top to bottom in one namespace. A block of `output` is what the `python` block before it prints."""
    settings = contextlib.ExitStack()
    if within(page) in RELAXED:
        settings.enter_context(jax.numpy_dtype_promotion("standard"))
        settings.enter_context(jax.numpy_rank_promotion("allow"))
    namespace, printed = {"__name__": page.stem}, ""
    with settings:
        for language, source in BLOCK.findall(page.read_text(encoding="utf-8")):
            if language == "python":
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile(source, f"{within(page)}: {source.splitlines()[0]}", "exec"), namespace)
                printed = out.getvalue()
            elif language == "output":
                assert printed == source, within(page)


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name, own_print_options):
    if name == "jsoftmax.__main__":
        pytest.skip("runs the program")
    # As a reader would; the examples' own settings show in what they print.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_public_functions_have_examples():
    functions = [getattr(jsoftmax, name.removeprefix("jsoftmax.")) for name in public_names(jsoftmax)]
    functions = [function for function in functions if inspect.isfunction(function)]
    bare = {function.__name__ for function in functions if ">>> " not in inspect.getdoc(function)}
    assert bare <= {"default_block_size"}  # the linear page has one


@by_page
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    targets = [target for target in LINK.findall(text) if not target.startswith(("http:", "https:", "mailto:"))]
    for target in targets:
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


def test_every_page_is_in_the_table_of_contents():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = " ".join(re.findall(r"^```\{toctree\}\n(.*?)^```$", index, re.MULTILINE | re.DOTALL)).split()
    pages = {*PAGES, *DOCS.glob("*.ipynb")} - {ROOT / "README.md", DOCS / "index.md"}
    names = {page.relative_to(DOCS).with_suffix("").as_posix() for page in pages}
    assert {entry for entry in listed if not entry.startswith(":")} >= names


@pytest.mark.parametrize("page", CHINESE, ids=within)
def test_chinese_page_says_the_same_as_its_original(page):
    """The same programs, outputs and formulas; only comments and words inside formulas are translated."""

    def content(page):
        text = page.read_text(encoding="utf-8")
        blocks = [
            (language, ast.dump(ast.parse(source)) if language == "python" else source)
            for language, source in BLOCK.findall(text)
        ]
        return blocks, [re.sub(r"\\text\{[^}]*\}", "", formula) for formula in FORMULA.findall(text)]

    assert content(page) == content(DOCS / page.name)


def test_blocks_that_are_wrong_are_found(own_print_options):
    """The expressions above find what they are meant to find."""
    text = "[a](b.md)\n```python\nprint(1)\n```\n```output\n1\n```\n```sh\nls\n```\n![image](c.png)\n"
    assert BLOCK.findall(text) == [("python", "print(1)\n"), ("output", "1\n"), ("sh", "ls\n")]
    assert LINK.findall(BLOCK.sub("", text)) == ["b.md"]
    assert FORMULA.findall("a\n\n$$\nx = y\n$$\n\nb $z$\n\n$$\nv\n$$\n") == ["x = y\n", "v\n"]
    assert jnp.get_printoptions()["precision"] == 8
