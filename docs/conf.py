"""How the documentation is built: `make docs`. Nothing is fetched from the network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jsoftmax

project = "jsoftmax"
author = "The jsoftmax authors"
copyright = "The jsoftmax authors"
version = release = jsoftmax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",  # MathJax beside the pages, so that they are read without a network, too
]
exclude_patterns = ["_build", "jupyter_execute"]
html_theme = "furo"
html_title = f"jsoftmax {version}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["narrow.css"]

# Pages hold their outputs, and the tests run their code; nothing is executed here.
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# In docstrings, `word` is code, the Args say what the types are, and options are listed like arguments.
default_role = "literal"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Options", "params_style")]


def list_options(app, what, name, obj, options, lines):
    """The dictionaries of options name their keys right below the first paragraph."""
    if name.endswith("Options"):
        first = lines.index("") + 1
        lines[first:] = ["Options:", *(f"    {line}" for line in lines[first:])]


def setup(app):
    # Before napoleon, which reads the sections at the priority of 500.
    app.connect("autodoc-process-docstring", list_options, priority=400)
