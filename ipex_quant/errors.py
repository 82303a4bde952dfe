"""Errors for what IPEX refuses by an assertion: also caught by code that expects an AssertionError."""


class ArgumentError(ValueError, AssertionError):
    """An argument that has a wrong value."""


class ArgumentTypeError(TypeError, AssertionError):
    """An argument of a wrong type."""


class OrderError(RuntimeError, AssertionError):
    """A call that needs another one before it."""
