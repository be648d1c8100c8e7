"""Every option once: the arguments of the functions, the flags of the commands, the keys of YAML files."""

from secateur.options.base import Names, Options, default_of, extra, make, read_yaml, step, to_yaml
from secateur.options.fields import (
    PROFILE_FILES,
    SCOUT_FILES,
    STUDY_FILES,
    Arithmetic,
    Dtype,
    PoolingName,
    SavedPooling,
)
from secateur.options.inference import EncodeOptions, ExportOptions, ServeOptions
from secateur.options.runs import (
    CompareOptions,
    CostOptions,
    EvaluateOptions,
    ReportOptions,
    ResumeOptions,
    StatusOptions,
    StudyOptions,
    read_study,
)
from secateur.options.way import (
    Budget,
    ChooseOptions,
    HealOptions,
    HealSettings,
    ProfileOptions,
    PruneOptions,
    ScoutOptions,
)

__all__ = [
    "PROFILE_FILES",
    "SCOUT_FILES",
    "STUDY_FILES",
    "Arithmetic",
    "Budget",
    "ChooseOptions",
    "CompareOptions",
    "CostOptions",
    "Dtype",
    "EncodeOptions",
    "EvaluateOptions",
    "ExportOptions",
    "HealOptions",
    "HealSettings",
    "Names",
    "Options",
    "PoolingName",
    "ProfileOptions",
    "PruneOptions",
    "ReportOptions",
    "ResumeOptions",
    "SavedPooling",
    "ScoutOptions",
    "ServeOptions",
    "StatusOptions",
    "StudyOptions",
    "default_of",
    "extra",
    "make",
    "read_study",
    "read_yaml",
    "step",
    "to_yaml",
]
