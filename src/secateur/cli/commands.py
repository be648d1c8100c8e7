"""The commands. No logic: options come from :mod:`.options`, work is done by the functions of the same names.

A mistake of the user gives one line on standard error and exit code 2; ``SECATEUR_DEBUG=1`` shows the traceback.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
import webbrowser
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import secateur
from secateur import options as config
from secateur.cli import terminal
from secateur.cli.arguments import Commands, command_of
from secateur.document import plural, speed
from secateur.errors import SYSTEM, DataError, MissingPackage, SecateurError, system_error

app = typer.Typer(
    help="Cut a language model down to the text encoder you can afford.",
    cls=Commands,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130
GRACE = 10.0
"""Seconds in which the first of several processes here may say what is wrong with all, and their launcher end them."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PlanOnly = Annotated[bool, typer.Option("--plan", help="Show the steps and their estimated times, and do nothing.")]
OpenPage = Annotated[bool, typer.Option("--open", help="Open the page in the browser at the end.")]

UsageError: Any = typer.BadParameter.__base__
"""An option or command that does not exist. Its home depends on the version: typer brings a click of its own."""


def main() -> None:
    """Run a command; turn what goes wrong into one line."""
    for stream in (sys.stdout, sys.stderr):  # a sign that a terminal's code page lacks is no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if "LOCAL_RANK" not in os.environ:  # where processes train together, their launcher wants them to end at once
        # As Ctrl-C does. By default the first process of a container would not hear it, and no other would clean up.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # typer returns the code of a click.Exit (--help) instead of raising it; since 0.29 Ctrl-C is one, too.
        code = app(sys.argv[1:] or ["--help"], prog_name="secateur", standalone_mode=False) or 0
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code)
    except SecateurError as error:
        _fail(str(error), 2)
    except UsageError as error:
        _fail(error.format_message(), 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; the same command goes on where it can", INTERRUPTED)
    except ModuleNotFoundError as error:  # in looking at what the command names; the steps say it themselves
        package = str(error.name).partition(".")[0]
        _fail(str(MissingPackage(package, "this command", "pip install 'secateur[torch]'")), 2)
    except OSError as error:
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 2)
    except Exception as error:  # the last line of defence: a bug, said in one line
        if found := system_error(error):
            _fail(": ".join(SYSTEM[found.errno or 0]), 2)
        _fail(f"unexpected {type(error).__name__}: {error}; SECATEUR_DEBUG=1 shows where", 1)


def _fail(message: str, code: int) -> None:
    if os.environ.get("SECATEUR_DEBUG"):
        raise  # called from an except block only
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(GRACE if code != INTERRUPTED else 0)
    typer.echo("secateur: " + " ".join(message.split()), err=True)
    sys.exit(code)


def _do(name: str, options: config.Options) -> Any:
    with terminal.work_bars(name) as progress:
        return getattr(secateur, name)(**options.given(), progress=progress)


def _say(*lines: object, err: bool = False) -> None:
    for line in lines:
        typer.echo(line, err=err)


@command_of(app)
def profile_command(options: config.ProfileOptions) -> None:
    terminal.show_profile(_do("profile", options))
    _say(f"\n{options.out}/profile.json", *sorted(Path(str(options.out)).glob("*.png")))


@command_of(app)
def choose_command(options: config.ChooseOptions, *, as_json: Json = False) -> None:
    found = _do("candidates", options)
    _say(json.dumps(asdict(found))) if as_json else terminal.show_candidates(found)


@command_of(app)
def prune_command(options: config.PruneOptions) -> None:
    from secateur.results import Origin, load

    folder = _do("prune", options)
    origin = load(folder, Origin)
    if origin.left_out:
        _say(f"left out: {', '.join(origin.left_out)}", err=True)
    if origin.vocabulary:
        from secateur.reporting.verdict import coverage_notes, vocabulary_facts

        notes = (f"note: {note}" for note in coverage_notes(folder.name, origin.vocabulary))
        _say(*vocabulary_facts(origin.vocabulary), *notes, err=True)
    _say(folder)


@command_of(app)
def heal_command(options: config.HealOptions) -> None:
    from secateur.results import Training, load

    folder = _do("heal", options)
    if not terminal.SPEAKS:
        return
    settings = load(folder, Training).settings
    _say(f"trained by {settings['objective']}", *(f"note: {note}" for note in settings["notes"]), err=True)
    _say(folder)


@command_of(app)
def scout_command(options: config.ScoutOptions) -> None:
    terminal.show_scout(_do("scout", options))
    _say(f"\n{options.out}/scout.json", f"{options.out}/frontier.png", f"{options.out}/model")


@command_of(app)
def evaluate_command(options: config.EvaluateOptions) -> None:
    terminal.show_scores(_do("evaluate", options))
    _say(f"\n{options.out}/scores.json")


@command_of(app)
def tasks_check_command(options: config.CheckTasksOptions) -> None:
    checks = secateur.check_tasks(**options.given())
    terminal.show_checks(checks)
    if any(check.problem for check in checks):
        raise typer.Exit(2)


@command_of(app)
def tasks_make_command(options: config.MakeTaskOptions) -> None:
    terminal.show_made_task(secateur.make_task(**options.given()))
    _say(options.out)


@command_of(app)
def cost_command(options: config.CostOptions) -> None:
    terminal.show_costs(_do("cost", options).rows)
    _say(f"\n{options.out}/costs.json")


@command_of(app)
def compare_command(options: config.CompareOptions) -> None:
    terminal.show_comparison(_do("compare", options))
    _say(f"\n{options.out}/comparison.json")


@command_of(app)
def export_command(options: config.ExportOptions) -> None:
    terminal.show_export(_do("export", options))
    _say(f"\n{options.out}")


@command_of(app)
def report_command(options: config.ReportOptions, *, open_page: OpenPage = False) -> None:
    page = secateur.report(**options.given())
    _say(*secateur.read_verdict(options.run), "")
    _show_page(page, open_page)


@command_of(app)
def study_command(options: config.StudyOptions, *, plan: PlanOnly = False, open_page: OpenPage = False) -> None:
    if plan:
        terminal.show_steps(_do("plan_study", options))
    else:
        _study(options.given(), open_page)


@command_of(app)
def study_status_command(options: config.StatusOptions) -> None:
    terminal.show_steps(secateur.read_status(options.run))


@command_of(app)
def study_resume_command(options: config.ResumeOptions, *, open_page: OpenPage = False) -> None:
    given = options.given()
    _study({"out": given.pop("run"), **given}, open_page)


def _study(given: dict[str, Any], open_page: bool) -> None:
    with terminal.study_bars() as (progress, callback):
        page = secateur.study(**given, progress=progress, callback=callback)
    with suppress(DataError):  # a study of depths without tasks has no scores
        terminal.show_scores(secateur.read_scores(given["out"]))
    _say("", *secateur.read_verdict(given["out"]), "")
    _show_page(page, open_page)


def _show_page(page: Path, in_browser: bool) -> None:
    _say(page)
    if in_browser and not webbrowser.open(page.resolve().as_uri()):
        typer.echo("there is no browser here to open it in", err=True)


@command_of(app)
def encode_command(options: config.EncodeOptions) -> None:
    from secateur.data.rows import check_column

    check_column(options.files, options.column)
    from secateur.inference.workers import keep_freed_memory  # with torch

    keep_freed_memory()
    done = _do("encode", options)
    told = f"{plural(done.rows, 'row')}, {plural(done.distinct, 'distinct text')}, {done.dimension} dimensions"
    _say(f"{told}, {done.told or f'{done.backend} {done.dtype}'}", err=True)
    if done.encoded:
        texts, tokens = (speed(count / done.seconds) for count in (done.encoded, done.tokens))
        _say(f"encoded {plural(done.encoded, 'text')}, {texts} texts and {tokens} tokens per second", err=True)
    _say(done.file)


@command_of(app)
def serve_command(options: config.ServeOptions) -> None:
    secateur.serve(**options.given())


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("secateur"))
        raise typer.Exit
