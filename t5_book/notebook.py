"""A helper for the chapters: let a class grow over several cells.

Built in chapter 1, "Text-to-text: every task as text"
(chapters/text_to_text.md). Edit the chapter, not this file.
"""

__all__ = []


def add_to(cls):
    """Make the decorated function a method of ``cls``.

    Objects that exist already have the method, too. In the modules of the
    package, the method stands in the class body and this decorator is gone.
    """

    def add(method):
        function = method.fget if isinstance(method, property) else method
        setattr(cls, function.__name__, method)
        return method

    return add
