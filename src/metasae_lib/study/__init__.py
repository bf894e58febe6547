"""What to study, and where it is kept."""

from __future__ import annotations

from metasae_lib.study.arms import (
    COMPETITORS,  # kinds of arm that are other methods
    ArmSpec,  # one condition under which a dictionary is trained
)
from metasae_lib.study.errors import (
    ArtefactError,  # a file of a run that is missing or harmed
    CorpusError,  # text that cannot be read or is too short
    DictionaryError,  # a dictionary that does not fit
    MeasureError,  # a measurement that its inputs cannot support
    MetaSAEError,  # base of all errors: one sentence each
    ProfileError,  # a profile or an override that cannot be used
    PublishedError,  # a published value that is missing
    SubjectError,  # a language model that cannot be run
    TrainingError,  # an arm that cannot be trained
)
from metasae_lib.study.files import (
    atomic_write,  # a file written whole or not at all
    repository_folders,  # folders of a name, from here upwards
)
from metasae_lib.study.plan import plan_text  # what a profile costs, before anything is spent
from metasae_lib.study.profile import Profile  # what to study, as one validated page of YAML
from metasae_lib.study.progress import progress  # a bar on a terminal, silence elsewhere
from metasae_lib.study.run import (
    Artefact,  # one content-addressed folder, complete or not yet
    Run,  # one profile on disk: the only builder of paths
)
from metasae_lib.study.sections import Role  # what a part of the text is for
