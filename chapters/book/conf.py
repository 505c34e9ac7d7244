"""Sphinx settings for the book; chapters/book/book.py prepares the sources and calls Sphinx."""

import sys
from pathlib import Path

from docutils import nodes
from sphinx.util import logging

sys.path.insert(0, str(Path(__file__).parent))
import form  # noqa: E402
import pages  # noqa: E402
import reference  # noqa: E402

project = "bilevel_lite"
author = "The bilevel_lite authors"
project_copyright = "The bilevel_lite authors. Text: CC BY 4.0, code: MIT"
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
]
autodoc_typehints = "none"  # a signature is for reading; the types stand in the code
napoleon_numpy_docstring = False
default_role = "py:obj"  # `CG` in a docstring is a link
nb_execution_mode = "off"  # the notebooks bring their outputs
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # a table that a cell displays is a table here too
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # solutions go from the title to `### Exercise` at once

html_theme = "furo"
html_title = "bilevel_lite"
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["book.css"]
html_show_sphinx = False
html_theme_options = {
    "footer_icons": [
        {"name": "Source", "url": f"https://github.com/{form.address()}", "html": "Source"}
    ],
}


def fold(app, document):
    """Fold each block *Going deeper*, from below its heading to where `pages` marked its end."""
    for section in list(document.findall(nodes.section)):
        if not section.next_node(nodes.title).astext().startswith("Going deeper"):
            continue
        ends = [k for k, node in enumerate(section) if node.astext().strip() == pages.ENDS]
        if len(ends) != 1:
            logging.getLogger(__name__).warning(
                "a block Going deeper does not end", location=section
            )
            continue
        section[ends[0]] = nodes.raw("", "</details>", format="html")
        opens = (
            '<details class="deeper"><summary>Not needed for what follows: open to read</summary>'
        )
        section.insert(1, nodes.raw("", opens, format="html"))


def setup(app):
    app.connect("doctree-read", fold)
    app.connect(  # before napoleon, whose priority is 500
        "autodoc-process-docstring", lambda *given: reference.prepared(given[-1]), priority=400
    )
    app.connect(
        "autodoc-process-signature",
        lambda _, kind, name, thing, options, signature, returns: (
            reference.shortened(signature, name),
            returns,
        ),
    )
    # sphinx-mathjax-offline copies MathJax into _static and names the variant with web fonts, which
    # some browsers refuse on pages opened from a folder. The SVG variant needs none.
    app.config.mathjax_path = "mathjax/tex-svg.js"
