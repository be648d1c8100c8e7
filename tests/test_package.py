from __future__ import annotations

import ast
import importlib.metadata
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import secateur
from conftest import MakeEncoder
from secateur import options as config
from secateur.errors import ConfigError

SOURCE = Path(secateur.__file__).parent

ORDER = """
errors files provenance progress clusters document
results: models scores
runtime
options: base way runs
figures
models: compat blocks cutting forward save checks open_model static
measures: metrics intervals costs
data: rows hub sources vectors embedders
vocabulary: trim choice
evaluation: task_formats task_folder tasks replicates evaluate
choosing: selectors budgets choose
profiling: depths lens depth_scores corpus profile
pruning: download adapters prune
healing: recipes training_data processes teacher losses trainer heal
scouting: held_out scout
reporting: cost compare run findings verdict tables card report
studies: demo steps plan estimate runner study
exporting: convert export
inference: encoders backends workers monitoring queueing app serve
inference: vector_files encode
secateur
cli: arguments terminal commands
__main__
"""


def flow() -> list[str]:
    """The way through: packages and modules in their order; each imports only what stands before it."""
    modules: list[str] = []
    for line in ORDER.strip().splitlines():
        package, colon, names = line.rpartition(":")
        modules += [f"{package}.{name}" if colon else name for name in names.split()]
    return modules


FLOW = flow()
PARTS = {
    "runtime": "runtime",
    "cli": "cli.commands",
    "options": "options.runs",
    "results": "results.scores",
    "models": "models.compat",
}
"""Packages whose names are had from the package itself → where they stand."""


def test_the_exported_names():
    assert secateur.__all__ == [
        "SecateurError",
        "accelerate",
        "candidates",
        "check_tasks",
        "choose",
        "compare",
        "cost",
        "encode",
        "evaluate",
        "export",
        "heal",
        "make_task",
        "open_model",
        "plan_study",
        "profile",
        "prune",
        "read_scores",
        "read_status",
        "read_verdict",
        "report",
        "scout",
        "serve",
        "study",
    ]
    assert dir(secateur) == secateur.__all__
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        secateur.nonesuch  # noqa: B018


def test_a_step_without_its_packages_says_what_to_install():
    script = "import sys\nsys.modules['uvicorn'] = None\nimport secateur\nsecateur.serve"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.stderr.rstrip().endswith(
        "MissingPackage: secateur serve needs the package uvicorn: pip install 'secateur[serve]'"
    )


def installed_with(requirement: str) -> set[str]:
    """The names of all distributions that a requirement brings, by what is installed here."""
    names: set[str] = set()
    todo = {requirement}
    seen: set[str] = set()
    while todo:
        seen.add(text := todo.pop())
        wanted = Requirement(text)
        names.add(canonicalize_name(wanted.name))
        for line in importlib.metadata.requires(wanted.name) or []:
            needed = Requirement(line)
            extras = wanted.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                todo |= {f"{needed.name}[{','.join(sorted(needed.extras))}]"} - seen
    return names


def imported_packages(module: Path) -> set[str]:
    """The top-level names of other packages that a module imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
    return found - set(sys.stdlib_module_names) - {"secateur"}


def test_what_the_source_imports_is_declared():
    declared = {canonicalize_name(Requirement(line).name) for line in declarations()}
    homes = importlib.metadata.packages_distributions()
    missing = {
        f"{name_of(module)}: {package}"
        for module in SOURCE.rglob("*.py")
        for package in imported_packages(module)
        if not declared & {canonicalize_name(home) for home in homes.get(package, [package])}
    }
    assert missing == set()


def declarations() -> list[str]:
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name != "dev"}
    return [*project["dependencies"], *(line for lines in extras.values() for line in lines)]


def test_the_light_runtime_is_installed_without_torch():
    light = installed_with("secateur[runtime]")
    assert {"numpy", "tokenizers", "onnxruntime"} <= light
    assert not {"torch", "transformers", "sentence-transformers"} & light
    assert {"torch", "transformers", "sentence-transformers", "mteb"} <= installed_with("secateur[torch]")


def test_a_step_without_torch_says_what_to_install():
    script = "import sys\nsys.modules['torch'] = None\nimport secateur\nsecateur.prune"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.stderr.rstrip().endswith(
        "MissingPackage: secateur prune needs the package torch: pip install 'secateur[torch]'"
    )


def test_a_command_without_its_packages_says_what_to_install(tmp_path: Path):
    script = "import sys\nsys.modules['scipy'] = None\nfrom secateur.cli import main\nmain()"
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, "-c", script, "prune", str(tmp_path), "--to", "large", "-o", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "secateur: this command needs the package scipy: pip install 'secateur[torch]'\n"


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((SOURCE.parents[1] / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["title"].split(":")[0], citation["version"]) == (project["name"], project["version"])
    assert citation["license"] == project["license"]


def imports(module: Path) -> set[str]:
    """The modules of secateur that a module imports, wherever in it, and not only for its types.

    ``secateur`` is the package itself, which has the functions of all steps.
    """
    tree = ast.parse(module.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "secateur":
            whole = str(node.module).removeprefix("secateur").removeprefix(".")
            found |= {whole} if whole in FLOW else {f"{whole}.{alias.name}".lstrip(".") for alias in node.names}
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
            found |= {name.removeprefix("secateur.") for name in names if name == "secateur" or "secateur." in name}
    return {name if name in FLOW else PARTS.get(name.split(".")[0], name) for name in found}


def name_of(module: Path) -> str:
    return ".".join(module.relative_to(SOURCE).with_suffix("").parts)


MODULES = sorted(path for path in SOURCE.rglob("*.py") if path.stem != "__init__" and path.parent.name != "runtime")


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_imports_go_one_way(module: Path):
    name = name_of(module)
    assert name in FLOW, f"say in ORDER where {name} stands"
    assert imports(module) <= set(FLOW[: FLOW.index(name)])


STEPS = {
    "profile": config.ProfileOptions,
    "choose": config.ChooseOptions,
    "prune": config.PruneOptions,
    "heal": config.HealOptions,
    "scout": config.ScoutOptions,
    "evaluate": config.EvaluateOptions,
    "check_tasks": config.CheckTasksOptions,
    "make_task": config.MakeTaskOptions,
    "encode": config.EncodeOptions,
    "report": config.ReportOptions,
    "cost": config.CostOptions,
    "compare": config.CompareOptions,
}


@pytest.mark.parametrize("step", STEPS)
def test_commands_and_functions_have_the_same_options_and_defaults(step: str):
    parameters = inspect.signature(getattr(secateur, step)).parameters
    for name, field in STEPS[step].model_fields.items():
        assert name in parameters, f"secateur.{step} lacks {name}"
        if not field.is_required():
            default = parameters[name].default
            assert (list(default) if isinstance(default, tuple) else default) == field.get_default(), name


def test_a_tilde_is_the_home_folder_in_python_and_yaml_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    lines = [f"Part {n} is about gardens. Its hedges are cut back to half their height.\n" for n in range(5)]
    (tmp_path / "home" / "texts.txt").write_text("".join(lines))
    (tmp_path / "~draft.txt").write_text("".join(lines))
    assert secateur.make_task("~/texts.txt", out="~/task").documents == 1
    assert (tmp_path / "home" / "task" / "task.json").is_file()
    assert secateur.make_task(Path("~draft.txt"), out=Path("task")).documents == 1  # of nobody called draft
    assert [check.problem for check in secateur.check_tasks(Path().glob("t*"))] == [""]
    (tmp_path / "options.yaml").write_text("tasks: ['~/task']\nmodels: ['~/model']\nout: ~/scores\n")
    made = config.make(config.EvaluateOptions, config.read_yaml(tmp_path / "options.yaml"))
    home = str(tmp_path / "home")
    assert (made.tasks, made.models, str(made.out)) == ([f"{home}/task"], [f"{home}/model"], f"{home}/scores")


@pytest.mark.parametrize("step", ["prune", "heal", "export", "encode", "serve", "cost", "compare", "scout", "study"])
def test_an_open_model_is_refused_in_a_line_where_a_name_is_needed(step: str, make_encoder: MakeEncoder):
    own, known = make_encoder(), inspect.signature(getattr(secateur, step)).parameters
    options = {"models": [own, own], "model": own, "out": "out", "data": "pairs.jsonl", "files": "texts.txt"}
    given = {name: value for name, value in options.items() if name in known}
    with pytest.raises(ConfigError, match=r"^models?\S*: SentenceTransformer.* has to be saved first$") as raised:
        getattr(secateur, step)(**given)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


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
        "import os\n"
        "os.environ['_SECATEUR_COMPLETE'] = 'complete_bash'\n"
        "os.environ |= {'COMP_WORDS': 'secateur heal m --t', 'COMP_CWORD': '3'}\n"
        "try:\n    app(prog_name='secateur')\nexcept SystemExit as ended:\n    assert not ended.code\n"
        f"heavy = set({HEAVY!r}.split()) & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout
    assert "--teacher\n" in done.stdout
