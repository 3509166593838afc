"""What the site of the book adds to Sphinx.

Links to the repository: its address stands in ``_config.yml`` (``repository:
url``). Buttons that need one are on when it is set, and off while it is
empty.

Links to a label of another page, ``attention.md#attention-masks``: MyST
knows them for headings alone. In JupyterLab they open the chapter, too.
"""

BUTTONS = ("repository", "edit_page", "issues")


def switch_buttons(app, config):
    """Turn on the buttons that need an address, if there is one."""
    options = config.html_theme_options
    for button in BUTTONS:
        options[f"use_{button}_button"] = bool(options["repository_url"])


def remember_labels(app, doctree):
    """Put the labels of a page beside its headings, where MyST looks."""
    page = app.env.metadata[app.env.docname]
    anchors = page.setdefault("myst_slugs", {})
    for label, anchor in doctree.nameids.items():
        if anchor and doctree.nametypes.get(label):  # written by hand
            anchors.setdefault(label, (None, anchor, label))


def setup(app):
    """Register with Sphinx."""
    app.connect("config-inited", switch_buttons, priority=100)
    app.connect("doctree-read", remember_labels)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
