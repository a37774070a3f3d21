"""The errors of both packages.

An :class:`InputError` is one paragraph for the person who ran the command: what was expected, what came, and
what to do about it. The command line prints it without a traceback.
"""


class InputError(ValueError):
    """Something the user can mend: an argument, a file, a model, an environment."""


class UnsupportedLayer(InputError):
    """The model holds an operation whose bounds are not known; nothing is ever skipped silently."""


class SoundnessError(RuntimeError):
    """A claimed certificate was contradicted by a concrete input: a defect, never to be ignored."""
