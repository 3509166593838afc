"""What the site of the book adds to Sphinx: links to the repository.

The address stands in ``_config.yml`` (``repository: url``). Buttons that
need one are on when it is set, and off while it is empty.
"""

BUTTONS = ("repository", "edit_page", "issues")


def switch_buttons(app, config):
    """Turn on the buttons that need an address, if there is one."""
    options = config.html_theme_options
    for button in BUTTONS:
        options[f"use_{button}_button"] = bool(options["repository_url"])


def setup(app):
    """Register with Sphinx."""
    app.connect("config-inited", switch_buttons, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
