# SPDX-License-Identifier: Apache-2.0
"""Sphinx: the site is the repository's pages, as they lie, and an API page for each public module.

Its source folder is the root, so that links between pages are those that GitHub shows.
`.ci/docs` builds it, without a network.
"""

import fastattn

project = "fastattn"
author = copyright = "The fastattn developers"
version = release = fastattn.__version__

root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "examples/README.md",
]
suppress_warnings = ["toc.empty_glob"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "numpydoc",
    "sphinx_copybutton",
]
myst_heading_anchors = 4
highlight_language = "none"  # blocks of code say theirs

# Docstrings say types in words. `name` in them is a name of Python where there is one.
default_role = "py:obj"
autodoc_default_options = {"members": True}
autodoc_typehints = "none"
numpydoc_show_class_members = False
maximum_signature_line_length = 80

html_theme = "furo"
html_title = f"fastattn {version}"
html_static_path = ["site/static"]
html_css_files = ["site.css"]
html_extra_path = ["site/root"]  # from the root of the site to its first page
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"


def is_left_out(app, what, name, value, skip, options):
    """Leave out what Python says of the fields of named tuples: "Alias for field number 0"."""
    return True if type(value).__name__ == "_tuplegetter" else None


def setup(app):
    """Say which members have no place."""
    app.connect("autodoc-skip-member", is_left_out)
