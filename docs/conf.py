"""Sphinx's configuration: `make docs` builds the site from the Markdown files beside this."""

project = "autotune"
copyright = "the autotune authors"  # noqa: A001 - Sphinx's name
extensions = ["myst_parser"]
exclude_patterns = ["_site"]
# Headings can be linked to.
myst_heading_anchors = 3
# Links out of docs/ lead to files that a forge shows.
myst_url_schemes = ["http", "https", "mailto"]
html_theme = "furo"
html_title = "autotune"
# Nothing is asked of the network while it is built or read.
html_copy_source = False
html_show_sphinx = False
