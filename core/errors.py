"""The one exception a user is meant to see."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right: a wrong recipe, a missing file, an unsupported model.

    The message is one short paragraph: what is wrong, where, and what to do. The command line prints it
    without a traceback and exits with code 2.
    """
