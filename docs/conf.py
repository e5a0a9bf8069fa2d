"""Sphinx configuration: `make docs`."""

from importlib.metadata import version as installed_version

project = "Lockstep"
author = "The Lockstep authors"
copyright = author  # noqa: A001 - Sphinx's name
release = version = installed_version("lockstep")

extensions = ["myst_parser"]
exclude_patterns = ["results"]  # dated results, a page each; linked by file
myst_heading_anchors = 3
smartquotes = False  # would make one dash of the two before an option
myst_enable_extensions = ["colon_fence"]

html_theme = "furo"
html_title = f"Lockstep {version}"
html_copy_source = False
