"""The one exception of our own."""


class UnsupportedModelError(ValueError):
    """The model cannot be chunked exactly; the message names what stands in the way."""
