"""What to study, and where it is kept.

- `MetaSAEError`: base of every error raised on purpose: one sentence each
- `ArmSpec`: one condition under which a dictionary is trained
- `Profile`: what to study, as one validated page of YAML
- `Run`: one profile on disk: the only builder of paths
- `plan_text`: what a profile costs, before anything is spent
"""

from __future__ import annotations

from metasae_lib.study.arms import ArmSpec
from metasae_lib.study.errors import MetaSAEError
from metasae_lib.study.plan import plan_text
from metasae_lib.study.profile import Profile
from metasae_lib.study.run import Run
