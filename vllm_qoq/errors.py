"""What all errors that a user can mend have in common."""


class UserError(ValueError):
    """Something that was asked for cannot be done. The message says why, and what to do instead."""
