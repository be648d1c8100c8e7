from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import secateur
from secateur import config

SOURCE = Path(secateur.__file__).parent

ORDER = """
errors files provenance artifacts figures progress config
stacks legality blocks shards sources lora cut_plan shard_writer checkpoint embedder verify
gguf pooling models
jsonl e5_mix data texts
metrics curves bootstrap forward lens flops parts depths
vectors task_folder tasks intervals differences predictions evaluate depth_scores
profile selectors budgets choose candidates selection prune
remote recipe processes teacher minibatches objectives trainable trainer train lessons heal
cost compare
run findings saturation printing verdict drawings card report
demo presets plan estimate runner study
graph runtime convert compatibility export
encoders exported queueing gate embeddings serve
engine pools rows vector_files encode
cli
__main__
"""
FLOW = ORDER.split()
"""The way through: a module imports only what stands before it."""


def test_the_exported_names():
    assert secateur.__all__ == [
        "SecateurError",
        "accelerate",
        "candidates",
        "choose",
        "compare",
        "cost",
        "encode",
        "evaluate",
        "export",
        "heal",
        "open_model",
        "plan_study",
        "profile",
        "prune",
        "read_scores",
        "read_status",
        "report",
        "serve",
        "study",
    ]
    assert dir(secateur) == secateur.__all__
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        secateur.nonesuch  # noqa: B018


def test_a_step_stays_the_step_once_its_module_is_imported():
    import secateur.profile
    import secateur.study

    for name in set(secateur.__all__) - {"SecateurError"}:
        assert inspect.isfunction(getattr(secateur, name)), name


def test_a_step_without_its_packages_says_what_to_install():
    script = "import sys\nsys.modules['uvicorn'] = None\nimport secateur\nsecateur.serve"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.stderr.rstrip().endswith(
        "MissingPackage: secateur serve needs the package uvicorn: pip install 'secateur[serve]'"
    )


def imports(module: Path) -> set[str]:
    """The modules of the package that a module imports, wherever in it, and not only for its types."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "secateur":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("secateur."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("secateur.")}
    return found


MODULES = sorted(path for path in SOURCE.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_imports_go_one_way(module: Path):
    assert module.stem in FLOW, f"say in FLOW where {module.stem} stands"
    assert imports(module) <= set(FLOW[: FLOW.index(module.stem)])


STEPS = {
    "profile": config.ProfileOptions,
    "choose": config.ChooseOptions,
    "prune": config.PruneOptions,
    "heal": config.HealOptions,
    "evaluate": config.EvaluateOptions,
    "encode": config.EncodeOptions,
    "report": config.ReportOptions,
}


@pytest.mark.parametrize("step", STEPS)
def test_commands_and_functions_have_the_same_options_and_defaults(step: str):
    parameters = inspect.signature(getattr(secateur, step)).parameters
    for name, field in STEPS[step].model_fields.items():
        assert name in parameters, f"secateur.{step} lacks {name}"
        if not field.is_required():
            default = parameters[name].default
            assert (list(default) if isinstance(default, tuple) else default) == field.get_default(), name


def test_the_study_heals_as_heal_does():
    for name, field in config.HealSettings.model_fields.items():
        for options in (config.HealOptions, config.StudyOptions):
            assert options.model_fields[name].default == field.default
    profile, study = config.ProfileOptions.model_fields, config.StudyOptions.model_fields
    assert study["profile_scale"].default == profile["scale"].default
    assert study["max_examples"].default == profile["max_examples"].default


HEAVY = "torch transformers sentence_transformers mteb peft datasets numpy pandas scipy sklearn matplotlib"


def test_importing_the_package_and_asking_for_help_imports_nothing_heavy():
    script = (
        "import sys, secateur\nfrom secateur.cli import app\n"
        "assert app(['--help'], standalone_mode=False) in (None, 0)\n"
        "assert app(['study', '--help'], standalone_mode=False) in (None, 0)\n"
        f"heavy = set({HEAVY!r}.split()) & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout
