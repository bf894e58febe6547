"""Joint training of sparse autoencoders with meta-SAEs, and the measures around it.

Importing the package is light: torch and transformers load with the modules that need them.
"""

from __future__ import annotations

import os
import tempfile

from metasae_lib.study.errors import MetaSAEError
from metasae_lib.study.profile import Profile
from metasae_lib.study.run import Run

# Compiled kernels are kept beside the sources; who cannot write there (a second user, an installed
# package) has them in a temporary folder, since a home may be missing or not writable either.
if not os.access(os.path.dirname(__file__), os.W_OK):
    _folder = os.path.join(tempfile.gettempdir(), f"metasae-kernels-{os.getuid()}")
    os.environ.setdefault("NUMBA_CACHE_DIR", _folder)

__all__ = ["MetaSAEError", "Profile", "Run"]
