"""Errors with one clear sentence: what is wrong, and what to do about it."""

from __future__ import annotations


class MetaSAEError(Exception):
    """Base of every error that the library raises on purpose."""


class ProfileError(MetaSAEError):
    """A profile or an override that cannot be used."""


class ArtefactError(MetaSAEError):
    """A file of a run that is missing, truncated or foreign, or that cannot be written."""


class CorpusError(MetaSAEError):
    """Text that is missing, corrupt or too short for its roles."""


class SubjectError(MetaSAEError):
    """A language model that cannot be found, converted or run."""


class DictionaryError(MetaSAEError):
    """A dictionary whose shapes, settings or files do not fit."""


class TrainingError(MetaSAEError):
    """An arm that cannot be trained, continued or found."""


class MeasureError(MetaSAEError):
    """A measurement that its inputs cannot support."""


class PublishedError(MetaSAEError):
    """A published value that is missing or malformed."""


def first_line(error: Exception, otherwise: str = "") -> str:
    """The first line of an error's words; `otherwise`, or its type, if it has none."""
    return (str(error).strip().splitlines() or [otherwise or type(error).__name__])[0][:200]
