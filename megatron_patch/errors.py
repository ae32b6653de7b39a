"""The one error that says more than ValueError: who has to speak about it."""


class AgreedError(ValueError):
    """A user's error that every rank raises at the same place: rank 0 speaks for all."""
