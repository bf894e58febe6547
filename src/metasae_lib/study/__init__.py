"""What to study, and where it is kept."""

from __future__ import annotations

from metasae_lib.study.arms import ArmSpec  # one condition under which a dictionary is trained
from metasae_lib.study.errors import MetaSAEError  # base of all errors: one sentence each
from metasae_lib.study.plan import plan_text  # what a profile costs, before anything is spent
from metasae_lib.study.profile import Profile  # what to study, as one validated page of YAML
from metasae_lib.study.run import Run  # one profile on disk: the only builder of paths
