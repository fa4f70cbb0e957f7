"""How Sphinx builds these pages: ``sphinx-build -W --keep-going -n docs build/docs``."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]  # these pages are about the code beside them

import hap_onnx  # noqa: E402

project = "hap-onnx"
author = copyright = "The authors of hap-onnx"
version = release = hap_onnx.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "sphinx_copybutton",
    "described",  # ours: options and errors as the code declares them
]
exclude_patterns = ["pictures/*.md"]
html_theme = "furo"
html_title = f"hap-onnx {release}"
html_extra_path = ["hap.schema.json"]  # so that an editor can be given its address
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["hap.css"]
smartquotes = False  # they take the two dashes of an option for one

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

nitpick_ignore_regex = [("py:class", r"(pathlib|onnx|collections)\..*")]  # of others: built without network
