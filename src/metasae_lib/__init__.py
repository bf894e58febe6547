"""Joint training of sparse autoencoders with meta-SAEs, and the measures around it.

Importing the package is light: torch and transformers load with the modules that need them.
"""

from __future__ import annotations

from metasae_lib.study.errors import MetaSAEError
from metasae_lib.study.profile import Profile
from metasae_lib.study.run import Run

__all__ = ["MetaSAEError", "Profile", "Run"]
