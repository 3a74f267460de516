"""The exceptions of our own."""


class UnsupportedModelError(ValueError):
    """The model cannot be chunked exactly; the message names what stands in the way."""


class BadSampleError(ValueError):
    """A sample of a stream cannot be trained on; the message names it. Those before it were trained on."""
