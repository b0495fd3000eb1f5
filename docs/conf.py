"""Sphinx configuration: Markdown pages, a gallery that is run, API reference from the docstrings."""

import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

import implicitdiff

project = "implicitdiff"
author = "the implicitdiff authors"
copyright = "the implicitdiff authors"  # noqa: A001
version = release = implicitdiff.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "numpydoc", "sphinx_gallery.gen_gallery"]
exclude_patterns = ["_build", "gallery"]  # of the gallery, what is made of it is read
default_role = "py:obj"
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "worked_systems",
    "within_subsection_order": "FileNameSortKey",
    "capture_repr": (),
    "image_srcset": ["2x"],
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
    "min_reported_time": 1e9,  # seconds; times differ from build to build
}

html_theme = "furo"
html_title = f"implicitdiff {release}"
html_show_copyright = False
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]


def _strip_code(app: Sphinx, doctree: nodes.document) -> None:
    # Doctests in Markdown need an empty line before the closing fence; the page does not.
    for block in doctree.findall(nodes.literal_block):
        text = block.astext().rstrip()
        block.rawsource = text
        block.children = [nodes.Text(text)]


def setup(app: Sphinx) -> None:
    """Register the clean-up of code blocks."""
    app.connect("doctree-read", _strip_code)


def _undocumented() -> list[str]:
    """Public names that the API page does not have."""
    page = (Path(__file__).parent / "api.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"auto\w+:: implicitdiff\.(\w+)(?:\(\))?$", page, re.MULTILINE))
    return sorted(set(implicitdiff.__all__) - shown)


if _undocumented():
    raise RuntimeError(f"docs/api.md lacks {', '.join(_undocumented())}")
