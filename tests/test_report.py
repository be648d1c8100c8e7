"""The report of a run: every number of its tables, nothing that the tables do not say, and nothing that runs."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from secateur.choosing.choose import losses_fingerprint
from secateur.errors import DataError
from secateur.provenance import Fingerprint, Provenance
from secateur.reporting.card import CARD_MARK
from secateur.reporting.findings import summarize
from secateur.reporting.report import report
from secateur.reporting.run import read_run
from secateur.reporting.verdict import recommend
from secateur.results import (
    CostRow,
    Costs,
    DepthRow,
    EvaluationRow,
    LossRow,
    Origin,
    Profile,
    ScoreRow,
    Scores,
    Training,
    load,
)

TASKS = (("STSBenchmark", "sts", "cosine_spearman", 1379), ("Banking77", "classification", "accuracy", 3080))
SCORES = {
    "tiny-8-healed": (0.80, 0.60),
    "tiny-6-healed": (0.78, 0.608),
    "tiny-2-healed": (0.61, 0.51),
    "tiny-8-zero-shot": (0.41, 0.37),
    "tiny-2-zero-shot": (0.33, 0.29),
}
SPEEDS = {8: (100.0, 96.0, 104.0), 6: (131.0, 127.0, 136.0), 2: (340.0, 322.0, 351.0)}


def made(command: str, seed: int | None = 42, *data: Fingerprint) -> Provenance:
    versions = {"python": "3.11.7", "secateur": "0.1.0", "torch": "2.13.0"}
    machine = {"machine": "x86_64", "system": "Linux", "cores": 2}
    return Provenance(command, "2026-03-04T05:06:07+00:00", seed, versions, data, machine)


NLI = Fingerprint("allnli.jsonl.gz", "a1" * 32, 277230, "CC BY-SA 4.0")
SICK = Fingerprint("sick.jsonl", "b2" * 32, 320)


def write_profile(run: Path, base: str = "tiny") -> None:
    rows = tuple(DepthRow(k, 3.125 - 0.211 * k, 0.021 * k, 0.317 / k, 11.3 + k) for k in range(1, 9))
    profile = Profile(
        made("secateur profile org/tiny --data sick.jsonl", 42, SICK),
        "org/tiny", 8, "weightedmean", 20.0, "float32", 64, 5, 128, "", rows,
    )  # fmt: skip
    profile.save(run / "profiles" / base)
    (run / "profiles" / base / "choice.json").write_text(json.dumps({"small": 2, "large": 6}))


def write_model(run: Path, name: str, depth: int, healed: bool, base_model: str = "org/tiny", seed: int = 42) -> Path:
    history = [f"secateur prune {base_model} --depth {depth}"] + ["secateur heal cut --steps 30"] * healed
    origin = Origin(made(history[-1]), base_model, 8, tuple(range(depth)), "mean", 1.5e-7, tuple(history))
    folder = run / "models" / name
    origin.save(folder)
    if healed:
        losses = tuple(LossRow(step, 2.718 - 0.0271 * step, 1e-4) for step in (10, 20, 30))
        settings = {"learning_rate": 2e-4, "loss": "contrastive"}
        provenance = made(history[-1], seed, NLI)
        trials = tuple(EvaluationRow(step, value) for step, value in ((10, 0.6123), (20, 0.6547), (30, 0.6391)))
        training = Training(provenance, name, 30, 61.0, 1_234_567, settings, {"allnli": "find"}, losses, trials, 20)
        training.save(folder)
    return folder


def write_scores(run: Path, name: str, values=None, tasks=TASKS) -> None:
    values = values or SCORES[name]
    rows = tuple(ScoreRow(name, *task[:3], value, task[3], 1.0) for task, value in zip(tasks, values, strict=True))
    Scores(made(f"secateur evaluate {name} --tasks eval"), rows).save(run / "scores" / name)


def write_costs(run: Path, names=SCORES) -> None:
    rows = []
    for name in names:
        depth = int(name.split("-")[1])
        rows.append(CostRow(name, depth, 10_000_000 + 3_540_000 * depth, 10_000_000, 4321 * depth, *SPEEDS[depth]))
    Costs(made("secateur cost models"), tuple(rows)).save(run)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run to change; its report comes without the files of the figures."""
    monkeypatch.setattr("secateur.figures.rendered", lambda figure: b"")
    return write_run(tmp_path / "demo")


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its report, to be read only."""
    folder = write_run(tmp_path_factory.mktemp("reported") / "demo")
    report(folder)
    return folder


def write_run(folder: Path) -> Path:
    write_profile(folder)
    for name in SCORES:
        write_model(folder, name, int(name.split("-")[1]), name.endswith("healed"))
        write_scores(folder, name)
    write_costs(folder)
    (folder / "study.yaml").write_text("models:\n  tiny: org/tiny\n# <b>not markup</b>\n")
    return folder


class Page(HTMLParser):
    """What a browser would see: text, tags with attributes, headings, tables by caption."""

    VOID = frozenset({"meta", "br", "img"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.headings: list[int] = []
        self.cells: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "tr":
            self.cells.append([])
        if tag in {"td", "th", "small"}:
            self.text += " "
        if tag in {"td", "th"}:
            self.cells[-1].append("")

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.cells[-1][-1] += data

    def rows(self, first: str) -> list[list[str]]:
        return [[cell.strip() for cell in row] for row in self.cells if row[0].strip().startswith(first)]

    def row(self, first: str) -> list[str]:
        return self.rows(first)[0]


def model_row(page: Page, name: str) -> list[str]:
    """That of the table of models."""
    return next(row for row in page.rows(name) if re.fullmatch(r"\d+ of \d+", row[1]))


def read(page: Path) -> Page:
    return Page(page.read_text(encoding="utf-8"))


def find_in(run: Path):
    return summarize(read_run(run))


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


def test_every_number_of_the_tables_is_in_the_page_and_in_the_markdown(reported: Path) -> None:
    page, markdown = read(reported / "report.html"), plain((reported / "report.md").read_text(encoding="utf-8"))
    markdown = re.sub(r"\\(.)", r"\1", markdown)
    expected = {f"{number:.3f}" for k in range(1, 9) for number in (3.125 - 0.211 * k, 0.021 * k, 0.317 / k)} | {
        f"{11.3 + k:.1f}" for k in range(1, 9)
    }
    expected |= {f"{100 * score:.1f}" for scores in SCORES.values() for score in scores}
    expected |= {f"{50 * sum(scores):.1f}" for scores in SCORES.values()}
    expected |= {f"{(10 + 3.54 * k):.1f} M" for k in SPEEDS} | {f"{4.321 * k:.1f} kB" for k in SPEEDS} | {"10.0 M"}
    expected |= {f"{number:.0f}" for numbers in SPEEDS.values() for number in numbers if number >= 100}
    expected |= {"1379", "3080", "277,230", "320", "1.2 M", "61 s", "2 of 8", "6 of 8", "8 of 8"}
    for number in expected:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", plain(page.text)), number
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", markdown), number
    for fingerprint in (NLI, SICK):
        assert fingerprint.sha256 in page.text
        assert fingerprint.sha256 in markdown
    for text in ("CC BY-SA 4.0", "2026-03-04 05:06 UTC", "x86_64", "2.13.0", "secateur heal cut --steps 30"):
        assert text in page.text
        assert text in markdown


def test_what_each_training_took_and_kept_is_told(reported: Path) -> None:
    page = read(reported / "report.html")
    assert "a ring marks the step whose weights were kept" in page.text
    told = "tiny-6-healed: 30 steps (weights of step 20) in 61 s, 1.2 M parameters trained, seed 42."
    assert told in plain(page.text) and told in plain((reported / "report.md").read_text(encoding="utf-8"))


def test_rows_hold_the_values_of_their_model(reported: Path) -> None:
    page = read(reported / "report.html")
    row = [plain(cell) for cell in model_row(page, "tiny-6-healed")]
    assert row[1:5] == ["6 of 8", "31.2 M", "10.0 M", "25.9 kB"]
    assert row[5] == "131127 to 136"
    assert row[6] == "69.4"
    assert row[7] == "−0.6to tiny, healed"
    assert model_row(page, "tiny-2-zero-shot")[-2] == "−39.0to tiny, healed"
    assert model_row(page, "tiny-8-healed")[-2] == "–"
    header = next(place for place, row in enumerate(page.cells) if len(row) == 3 and row[0] == "Model")
    assert [cell.startswith(task[0]) for cell, task in zip(page.cells[header][1:], TASKS, strict=True)] == [True, True]
    values = {row[0].removesuffix(" full model"): row[2].strip() for row in page.cells[header + 1 :] if len(row) == 3}
    lost = {"tiny-6-healed": "+0.8", "tiny-2-healed": "−9.0", "tiny-2-zero-shot": "−31.0"}  # to the best full model
    assert values == {name: f"{100 * scores[1]:.1f}{lost.get(name, '')}" for name, scores in SCORES.items()}
    costs = [plain(cell) for cell in page.rows("tiny-6-healed")[2]]
    assert costs[1:5] == ["6", "31.2 M", "10.0 M", "25.9 kB"]
    assert costs[5] == "131127 to 136"


def test_verdict_says_what_the_numbers_say(reported: Path) -> None:
    found = recommend(find_in(reported))
    assert plain(found.headline) == (
        "Not decided yet: tiny-6-healed scores −0.6 points beside tiny-8-healed, but without intervals that may be "
        "chance. Evaluate both again to get them."
    )
    page = read(reported / "report.html")
    assert found.headline in page.text
    assert [plain(reason) for reason in found.reasons] == [
        "Points, speed and size are relative to tiny-8-healed, the full model, on your 2 tasks.",
        "For half the cost of the full model: tiny-2-healed, −14.0 points (no interval), 3.40 × as fast, 25 % of the "
        "size.",
    ]
    assert all(reason in page.text for reason in found.reasons)
    assert "one seed" in page.text
    assert "chance" in page.text


def test_overlapping_speeds_are_no_claim(run: Path) -> None:
    costs = [replace(row, texts_per_second=101.0, speed_low=95.0, speed_high=105.0) for row in read_run(run).costs.rows]
    Costs(made("secateur cost"), tuple(costs)).save(run)
    said = " ".join(recommend(find_in(run)).reasons)
    assert "of the size" in said
    assert "as fast" not in said


def test_without_a_trained_full_model_the_untrained_one_is_named(run: Path) -> None:
    for path in (run / "scores" / "tiny-8-healed", run / "models" / "tiny-8-healed"):
        for file in path.iterdir():
            file.unlink()
    write_costs(run, [name for name in SCORES if name != "tiny-8-healed"])
    assert "relative to tiny-8-zero-shot, the full model" in recommend(find_in(run)).reasons[0]
    assert model_row(read(report(run)), "tiny-6-healed")[-2] == "+30.4to tiny, zero-shot"


def test_averages_over_different_tasks_are_not_compared(run: Path) -> None:
    write_scores(run, "tiny-6-healed", (0.9,), TASKS[:1])
    page = read(report(run))
    assert model_row(page, "tiny-6-healed")[-3:] == ["90.0", "–", "–"]
    assert [row for row in page.rows("tiny-6-healed") if len(row) == 3] == [["tiny-6-healed", "90.0", "–"]]
    assert "tiny-6-healed" not in find_in(run).compared


def test_a_score_that_is_not_a_number_is_no_zero(run: Path) -> None:
    write_scores(run, "tiny-6-healed", (float("nan"), 0.6))
    page = read(report(run))
    assert model_row(page, "tiny-6-healed")[-3:] == ["–", "–", "–"]


def test_several_seeds_are_one_row_with_their_mean_and_standard_error(run: Path) -> None:
    for seed, scores in ((1, (0.60, 0.50)), (2, (0.64, 0.52)), (3, (0.62, 0.48))):
        write_model(run, f"tiny-3-healed-seed{seed}", 3, healed=True, seed=seed)
        write_scores(run, f"tiny-3-healed-seed{seed}", scores)
    page = read(report(run))
    row = model_row(page, "tiny-3-healed")
    assert not page.rows("tiny-3-healed-seed1") and "tiny-3-healed-seed1: 30 steps" in page.text
    assert row[0] == "tiny-3-healed"
    mean, spread = 56.0, 1.73205  # of 55, 58 and 55
    # No interval: these scores have no draws, and that of the seeds alone says nothing of other texts.
    assert row[-3] == f"{mean:.1f}3 seeds, ± {spread / 3**0.5:.1f}"
    assert "Models were trained with up to 3 seeds; scores are means" in page.text
    assert "one seed" not in page.text


def test_a_seed_that_was_scored_on_more_tasks_than_the_full_model_has_a_card(run: Path) -> None:
    write_scores(run, "tiny-8-healed", (0.8,), TASKS[:1])
    for seed in (1, 2):
        write_model(run, f"tiny-3-healed-seed{seed}", 3, healed=True, seed=seed)
        write_scores(run, f"tiny-3-healed-seed{seed}", (0.6, 0.5)[:seed], TASKS[:seed])
    report(run)
    card = (run / "models" / "tiny-3-healed-seed2" / "README.md").read_text(encoding="utf-8")
    assert "| STSBenchmark | cosine\\_spearman | 1379 | 60.0 | – | 80.0 |" in card
    assert "| Banking77 | accuracy | 3080 | 50.0 | – | – |" in card
    assert "| Average |  |  | 55.0 |  | – |" in card  # of the full model it would be that of another task


def test_notes_and_commands_of_scores_are_in_the_report(run: Path) -> None:
    """A file of scores grows: its rows tell by themselves where they come from."""
    folder = run / "scores" / "tiny-2-healed"
    first, second = load(folder, Scores).rows
    rows = (
        replace(first, command="evaluate it | first"),
        replace(second, command="then", note="no interval: few rows"),
    )
    Scores(made("the last writer"), rows).save(folder)
    report(run)
    text = (run / "report.md").read_text()
    assert "Banking77, tiny-2-healed: no interval: few rows." in text
    assert "evaluate it | first" in text and "the last writer" not in text


def test_the_page_loads_and_runs_nothing(reported: Path) -> None:
    page = read(reported / "report.html")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "image", "base"}
    for _, attributes in page.tags:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in {"src", "href", "xlink:href", "srcset", "action"}:
                assert value is not None
                assert re.match(r"#|models/[\w-]+/$|data:image/png;base64,", value)
    source = (reported / "report.html").read_text(encoding="utf-8")
    assert "@import" not in source
    assert not re.search(r"url\((?!#)", source)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert "default-src 'none'" in policy


def test_the_page_is_sound_html(reported: Path) -> None:
    page = read(reported / "report.html")
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for key in ("href", "xlink:href"):
            if attributes.get(key, "").startswith("#"):
                assert attributes[key][1:] in ids
        for key in ("aria-labelledby",):
            assert all(name in ids for name in (attributes.get(key) or "").split())
    assert page.tags[[tag for tag, _ in page.tags].index("body") + 1] == ("a", {"class": "skip", "href": "#content"})
    count = {tag: sum(other == tag for other, _ in page.tags) for tag in ("table", "caption", "figure", "figcaption")}
    assert count["table"] == count["caption"] == 5
    assert count["figure"] == count["figcaption"] == 5
    assert all(a.get("alt") for tag, a in page.tags if tag == "img")
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    assert ("html", {"lang": "en"}) in page.tags


def test_the_same_run_gives_the_same_bytes(reported: Path, tmp_path: Path) -> None:
    def files() -> dict[str, bytes]:
        return {str(path.relative_to(again)): path.read_bytes() for path in again.rglob("*") if path.is_file()}

    again = tmp_path / reported.name
    shutil.copytree(reported, again)
    first = files()
    assert {"report.html", "report.md", "figures/curve-1.png", "models/tiny-2-healed/README.md"} <= set(first)
    report(again)
    assert files() == first


def test_more_tasks_than_models_are_the_rows(tmp_path: Path) -> None:
    tasks = tuple((f"task {i}", "sts", "cosine_spearman", 10) for i in range(4))
    for name, score in (("tiny-8-healed", 0.5), ("tiny-2-healed", 0.25)):
        write_model(tmp_path, name, int(name[5]), healed=True)
        write_scores(tmp_path, name, [score + i / 100 for i in range(4)], tasks)
    page = read(report(tmp_path))
    assert page.row("task 3") == ["task 3 (sts, cosine_spearman, 10 samples)", "53.0", "28.0−25.0"]
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert re.search(r"^\| task 3 \(sts, .*\) \| 53.0 \| 28.0 \(−25.0\) \|$", markdown, flags=re.M)


def test_the_base_models_licence_is_in_the_provenance(run: Path) -> None:
    write_model(run, "tiny-6-healed", 6, True, str(run.parent / "base"))
    (run.parent / "base").mkdir()
    (run.parent / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    page = read(report(run))
    assert "base (licence apache-2.0)" in page.text
    assert "org/tiny (licence not known)" in page.text
    assert "base (licence apache-2.0)" in (run / "report.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_report_over_two_hundred_models_is_small(tmp_path: Path) -> None:
    tasks = tuple((f"task {i}", "sts", "cosine_spearman", 10) for i in range(10))
    names = [f"base{b}-{d}-{recipe}" for b in range(5) for d in (8, 6, 2) for recipe in RECIPES]
    for name in names:
        write_profile(tmp_path, name.partition("-")[0])
        write_model(tmp_path, name, int(name.split("-")[1]), "zero" not in name)
        write_scores(tmp_path, name, [0.3 + len(name) / 100 + i / 100 for i in range(10)], tasks)
    write_costs(tmp_path, names)
    made_at = report(tmp_path)
    page = read(made_at)
    assert len(names) == 210
    assert made_at.stat().st_size < 5e6
    assert {row[0].removesuffix(" full model") for row in page.cells if len(row) == 11} >= set(names)


RECIPES = ("zero-shot", *(f"recipe{letter}" for letter in "abcdefghijklm"))

HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "\u202egnp.exe\u2069",
    "$x_{$ `code` | **bold** [a](javascript:alert(1))",
    "n" * 10_000,
    "</style></title></svg><b>",
    "\ud800\x00 half",
)


@pytest.mark.parametrize("name", HOSTILE, ids=("script", "quotes", "rtl", "markup", "long", "closing", "surrogate"))
def test_hostile_names_are_shown_and_run_nothing(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.figures.rendered", lambda figure: b"")  # see test_figures
    run = tmp_path / "run"
    write_profile(run, "tiny")
    profile = json.loads((run / "profiles/tiny/profile.json").read_text())
    provenance = profile["provenance"]
    provenance["command"] = provenance["hardware"]["machine"] = provenance["versions"]["torch"] = name
    provenance["data"] = [{"name": name, "sha256": name, "rows": 1, "licence": name}]
    (run / "profiles/tiny/profile.json").write_text(json.dumps({**profile, "model": name, "pooling": name}))
    (run / "profiles/tiny/choice.json").write_text(json.dumps({name: 3}))
    folder = write_model(run, "tiny-2-healed", 2, healed=True, base_model="m")
    origin = json.loads((folder / "secateur.json").read_text())
    (folder / "secateur.json").write_text(json.dumps({**origin, "base_model": name, "history": [name, name + "2"]}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {name: name}}))
    (run / "study.yaml").write_text("# " + name.replace("\x00", ""), errors="replace")
    scores = [{"model": name, "task": name, "type": name, "metric": name, "score": 0.5, "samples": 1, "seconds": 1.0}]
    cost = {"model": name, "depth": 2, "parameters": 5, "embedding_parameters": 2, "bytes": 9}
    cost |= {"texts_per_second": 2.0, "speed_low": 1.0, "speed_high": 3.0}
    for file, kind, rows in (("scores/s/scores.json", "scores", scores), ("costs.json", "costs", [cost])):
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).write_text(json.dumps({"kind": kind, "schema_version": 1, "provenance": provenance, kind: rows}))

    page = read(report(run))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "iframe", "b", "link"}
    assert all(a["src"].startswith("data:image/png;base64,") for tag, a in page.tags if tag == "img")
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert all(re.match(r"#|models/tiny-2-healed/$", a["href"] or "") for _, a in page.tags if "href" in a)
    shown = re.sub("[\u202e\u2069\x00]", "�", name.replace("\ud800", "?"))
    assert page.row(shown)
    assert not re.search("[\u202e\u2069\x00]", page.text)
    markdown = (run / "report.md").read_text(encoding="utf-8")
    outside_code = re.sub(r"^(`{3,})[^\n]*\n.*?^\1$", "", markdown, flags=re.S | re.M)
    assert not re.search(r"(?<!\\)<(?!br)", outside_code)
    assert "**bold**" not in outside_code
    rows = [line for line in outside_code.splitlines() if line.startswith("| ")]
    columns = {len(re.findall(r"(?<!\\)\|", line)) - 1 for line in rows}
    # tasks, data and profile, costs, models without a difference
    assert columns == {2, 4, 6, 7}
    card = (folder / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert "base_model" not in front


@pytest.mark.parametrize("part", ["profile", "models", "scores", "costs"])
def test_one_table_is_enough_and_missing_parts_are_left_out(tmp_path: Path, part: str) -> None:
    if part == "profile":
        write_profile(tmp_path)
    elif part == "models":
        write_model(tmp_path, "tiny-2-zero-shot", 2, healed=False)
    elif part == "scores":
        write_scores(tmp_path, "tiny-2-healed")
    else:
        write_costs(tmp_path)
    page = read(report(tmp_path))
    expected = {"profile": {"depth"}, "models": {"models"}, "scores": {"tasks", "models"}}
    expected["costs"] = {"models", "costs"}
    sections = {a["id"] for tag, a in page.tags if tag == "h2" and "id" in a}
    assert sections == {*expected[part], "commands", "provenance"}
    headings = re.findall("^## (.*)$", (tmp_path / "report.md").read_text(encoding="utf-8"), flags=re.M)
    names = {"depth": "Quality by depth", "models": "Models", "tasks": "Tasks", "costs": "Costs"}
    assert set(headings) == {names[s] for s in expected[part]} | {"Commands", "Provenance"}
    assert recommend(find_in(tmp_path)).headline in page.text


def test_a_folder_with_nothing_to_show_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no profile, model, scores or costs"):
        report(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        report(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


def test_an_edited_choice_holds_whatever_its_time_is_and_that_of_another_profile_does_not(run: Path) -> None:
    profile, choice = run / "profiles/tiny/profile.json", run / "profiles/tiny/choice.json"
    made_from = losses_fingerprint(load(profile, Profile))
    choice.write_text(json.dumps({"small": 3, "large": 7, "chosen_from": made_from}))
    os.utime(choice, (1, 1))  # as a copy may set it
    assert read_run(run).choices["tiny"] == {"small": 3, "large": 7}
    write_profile(run)
    choice.write_text(json.dumps({"small": 3, "large": 7, "chosen_from": "0123"}))
    os.utime(profile, (1, 1))
    assert read_run(run).choices["tiny"] == {}


@pytest.mark.parametrize("choice", ['{"small": 9}', '{"small": 0}', '{"small": true}', '{"small": "2"}', "[2]", "{"])
def test_a_broken_choice_is_an_error_and_nothing_is_written(run: Path, choice: str) -> None:
    (run / "profiles" / "tiny" / "choice.json").write_text(choice)
    with pytest.raises(DataError, match=r"choice\.json"):
        report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "key", "value", "place"),
    [
        ("scores/tiny-2-zero-shot/scores.json", "score", "high", r"scores\.0\.score"),
        ("costs.json", "texts_per_second", None, r"costs\.0\.texts_per_second"),
    ],
)
def test_a_value_of_another_type_is_an_error_with_its_key(run: Path, file: str, key: str, value, place: str) -> None:
    content = json.loads((run / file).read_text())
    content[Path(file).stem][0][key] = value
    (run / file).write_text(json.dumps(content))
    with pytest.raises(DataError, match=place):
        report(run)


def test_failed_steps_are_listed_and_those_done_since_are_not(run: Path) -> None:
    before = report(run).read_text()
    assert "What failed" not in before
    entries = [
        {"step": "heal tiny-2-hot", "outcome": "failed", "error": "diverged at step 3 <b>", "seconds": 1.0},
        {"step": "prune tiny-2", "outcome": "failed", "error": "the disk was full", "seconds": 1.0},
        {"step": "prune tiny-2", "outcome": "done", "seconds": 1.0},
    ]
    (run / "steps.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    page = report(run).read_text()
    assert "diverged at step 3 &lt;b&gt;" in page
    assert "the disk was full" not in page
    assert "heal tiny-2-hot: diverged at step 3" in (run / "report.md").read_text().replace("\\", "")
    assert page.partition("<main")[0] == before.partition("<main")[0]  # the verdict


def test_two_scores_of_one_model_on_one_task_are_an_error(run: Path) -> None:
    write_scores(run, "tiny-2-healed")
    again = run / "scores" / "again"
    again.mkdir()
    (again / "scores.json").write_bytes((run / "scores" / "tiny-2-healed" / "scores.json").read_bytes())
    with pytest.raises(DataError, match="two scores of tiny-2-healed on STSBenchmark"):
        report(run)


def test_markdown_shows_its_figures(reported: Path) -> None:
    shown = re.findall(r"!\[.*?\]\((.*?)\)", (reported / "report.md").read_text(encoding="utf-8"))
    assert len(shown) == 5
    for name in shown:
        assert (reported / name).read_bytes().startswith(b"\x89PNG")


def test_the_model_card_has_metadata_scores_and_use(run: Path) -> None:
    folder = run / "models" / "tiny-6-healed"
    prompts = {"query": "Find: ", "document": ""}
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    report(run)
    card = (folder / "README.md").read_text(encoding="utf-8")
    front, body = card.split("---\n", 2)[1:]
    content = yaml.safe_load(front)
    assert content == {
        "base_model": "org/tiny",
        "base_model_relation": "finetune",
        "pipeline_tag": "sentence-similarity",
        "library_name": "sentence-transformers",
        "tags": ["sentence-transformers", "feature-extraction", "sentence-similarity", "mteb", "secateur", "pruned"],
        "model-index": [
            {
                "name": "tiny-6-healed",
                "results": [
                    {
                        "task": {"type": kind},
                        "dataset": {"type": task.lower(), "name": task},
                        "metrics": [{"type": metric, "value": 100 * score}],
                    }
                    for (task, kind, metric, _), score in zip(TASKS, SCORES["tiny-6-healed"], strict=True)
                ],
            }
        ],
    }
    assert "the first 6 of the 8 layers" in body
    code = re.search(r"```python\n(.*?)```", body, re.S)
    assert code is not None
    compile(code[1], "card", "exec")
    assert "encode_query" in code[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in body.splitlines() if line.startswith("|")]
    assert ["STSBenchmark", r"cosine\_spearman", "1379", "78.0", "–", "80.0"] in rows
    assert ["Average", "", "", "69.4", "", "70.0"] in rows
    assert ["query", '"Find: "'] in rows
    assert "secateur prune org/tiny --depth 6" in body
    assert "learning_rate: 0.0002" in body
    assert NLI.sha256 in body
    assert "one seed" in body
    assert "trained with the same settings" in body
    untrained = (run / "models" / "tiny-2-zero-shot" / "README.md").read_text(encoding="utf-8")
    assert "not been trained after the cut" in untrained
    assert "encode_query" not in untrained


def test_scores_in_the_card_are_read_by_the_hubs_own_library(run: Path) -> None:
    write_model(run, "tiny-6-healed", 6, True, str(run.parent / "base"))
    (run.parent / "base").mkdir()
    (run.parent / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    file = run / "scores" / "tiny-6-healed" / "scores.json"
    table = json.loads(file.read_text())
    table["scores"][1] |= {"sample": 100, "seed": 7}
    file.write_text(json.dumps(table))
    report(run)
    card = ModelCard.load(run / "models" / "tiny-6-healed" / "README.md")
    assert card.data.license == "apache-2.0"
    _, found = card.data.eval_results or []
    assert (found.dataset_type, found.dataset_name) == ("banking77", "Banking77")
    assert (found.task_type, found.metric_type, found.metric_value) == ("classification", "accuracy", 60.8)
    assert found.dataset_args == {"sample": 100, "seed": 7}


def test_a_card_has_the_licence_and_the_languages_of_its_base(run: Path) -> None:
    folder = write_model(run, "tiny-6-healed", 6, True, str(run.parent / "base"))
    (run.parent / "base").mkdir()
    own = "license: other\nlicense_name: tiny-terms\nlicense_link: LICENSE\nlanguage:\n- de\n- en"
    (run.parent / "base" / "README.md").write_text(f"---\n{own}\n---\n# Base\n")
    report(run)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.license_name, card.data.language) == ("other", "tiny-terms", ["de", "en"])
    assert card.data.license_link is None  # that file is not in this folder
    (run.parent / "base" / "README.md").write_text(f"---\n{own.replace('LICENSE', 'https://a.org/t')}\n---\n")
    report(run)
    assert ModelCard.load(folder / "README.md").data.license_link == "https://a.org/t"
    assert str(run.parent) not in (folder / "README.md").read_text()


@pytest.mark.parametrize("base", ["./local", "/models/tiny", "tiny", "org/tiny.gguf", "a/b/c", "../x"])
def test_a_base_model_that_is_not_on_the_hub_is_no_metadata(tmp_path: Path, base: str) -> None:
    folder = write_model(tmp_path, "tiny-2-healed", 2, healed=True, base_model=base)
    report(tmp_path)
    content = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert not {"base_model", "base_model_relation", "license"} & set(content)


def test_a_card_publishes_no_folder_of_this_machine(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "b.csv").touch()  # which else could be a name of the Hub
    history = (
        "secateur prune /home/ann/acme/tiny --to 2 --adapter=/srv/secret/lora -o out/acme/cut",
        f"secateur prune {run}/scouts/tiny/model --to 2 -o {run}/models/cut",
        "secateur heal out/acme/cut --data '/home/ann/my texts/a.jsonl' acme/b.csv hf:org/s:en --teacher org/teacher",
    )
    folder = run / "models" / "tiny-2-healed"
    Origin(made(history[-1]), "/home/ann/acme/tiny", 8, (0, 1), "mean", 0.0, history).save(folder)
    settings = {"data": ["/home/ann/my texts/a.jsonl"], "teacher": "C:\\models\\big", "scale": 20.0}
    Training(made(history[-1]), "m", 1, 1.0, 1, settings, {"a": "either/or: "}, (LossRow(1, 1.0, 1.0),)).save(folder)
    report(run)
    card = (folder / "README.md").read_text(encoding="utf-8")
    for private in ("ann", "acme", "secret", "my texts", "models\\"):
        assert private not in card
    assert "secateur prune tiny --to 2 --adapter=lora -o cut" in card
    assert "secateur prune scouts/tiny/model --to 2 -o models/cut\n" in card  # as typed in the run folder
    assert "Training: 1 step in 1.0 s" in card
    assert "secateur heal cut --data a.jsonl b.csv hf:org/s:en --teacher org/teacher" in card
    assert "either/or" in card and "big" in card
    assert "/home/ann/acme/tiny" in (run / "report.md").read_text(encoding="utf-8")  # the report stays here


def test_scores_without_an_interval_say_why(run: Path) -> None:
    row = ScoreRow("tiny-2-healed", *TASKS[0][:3], 0.5, 3, 1.0, note="no interval: 3 queries are too few")
    Scores(made("secateur evaluate"), (row,)).save(run / "scores" / "tiny-2-healed")
    told = f"{TASKS[0][0]}, tiny-2-healed: no interval: 3 queries are too few."
    assert told in read(report(run)).text
    assert "3 queries are too few" in (run / "report.md").read_text(encoding="utf-8")
    full = replace(row, model="tiny-8-healed", score=0.6)
    for folder in (run / "scores").iterdir():
        shutil.rmtree(folder)
    Scores(made("secateur evaluate"), (row, full)).save(run / "scores" / "both")
    advice = recommend(find_in(run)).headline.partition("may be chance. ")[2]
    assert advice == f"{TASKS[0][0]}: no interval: 3 queries are too few."


def test_a_card_of_the_users_own_is_left_alone(run: Path) -> None:
    own, ours = run / "models" / "tiny-2-healed" / "README.md", run / "models" / "tiny-6-healed" / "README.md"
    text = "# X\n\nThis is a [sentence-transformers](https://www.SBERT.net) model that I trained.\n"
    own.write_text(text)  # such as an edited card of sentence-transformers
    ours.write_text(f"{CARD_MARK}\n")
    report(run)
    assert own.read_text() == text
    assert ours.read_text(encoding="utf-8").count("#") > 5


def test_other_subsets_are_named_by_layer(tmp_path: Path) -> None:
    origin = Origin(made("secateur prune"), "org/tiny", 8, (0, 1, 2, 5, 7), "mean", 0.0, ())
    origin.save(tmp_path / "models" / "tiny-5-zero-shot")
    page = read(report(tmp_path))
    assert "layers 0-2,5,7 (counted from 0, as by --keep)" in page.text
    assert "secateur prune" in page.text
