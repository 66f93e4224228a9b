"""Sphinx: ``make docs``, or the two builders of CONTRIBUTING.md."""

import torch_routers

project = "torch-routers"
version = release = torch_routers.__version__
copyright = "the torch-routers authors"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "benchmarks_table.md"]  # the latter is part of benchmarks.md
default_role = "py:obj"  # `Name` in a docstring
html_theme = "furo"
html_title = f"torch-routers {release}"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_rtype = False

# What every snippet may use; tests/test_docs.py gives the same names.
doctest_global_setup = """
import torch
import torch.nn.functional as F
from torch import nn
import torch_routers as tr
from torch_routers import *
from torch_routers.integrations.torchmetrics import RoutingMetric
from torch_routers.lora import *
from torch_routers.metrics import *
from torch_routers.losses import *
from torch_routers.ops import *
torch.manual_seed(0)
"""


def setup(app):
    """Attributes are described in prose; napoleon would take what is before a colon for a type."""
    prose = {}

    def save(app, what, name, obj, options, lines):
        if what in ("attribute", "property"):
            prose[name] = list(lines)

    def restore(app, what, name, obj, options, lines):
        lines[:] = prose.pop(name, lines)

    app.connect("autodoc-process-docstring", save, priority=400)  # napoleon's is 500
    app.connect("autodoc-process-docstring", restore, priority=600)
