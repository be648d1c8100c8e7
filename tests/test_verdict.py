"""What the first screen of a report says, in the page, in Markdown and on the terminal."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

import secateur
from secateur.results import CostRow, Costs
from test_findings import MADE, write_model
from test_report import plain, read, write_profile

FULL, HALF = (100.0, 98.0, 102.0), (210.0, 205.0, 215.0)


def write_costs(run: Path, **sizes: tuple[int, tuple[float, float, float]]) -> None:
    """``name_of_model=(millions of parameters, speeds)``."""
    rows = []
    for key, (size, speeds) in sizes.items():
        name = key.replace("_", "-")
        depth = int(name.split("-")[1])
        rows.append(CostRow(name, depth, size * 1_000_000, 1, size * 4_000_000, *speeds, latency_p50=size / 1000))
    Costs(MADE, tuple(rows)).save(run)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six of eight layers as good as all; three lose ten points."""
    monkeypatch.setattr("secateur.figures.rendered", lambda figure: b"")
    folder = tmp_path / "my run"
    for depth, score in ((8, 0.80), (6, 0.80), (3, 0.70)):
        write_model(folder, f"tiny-{depth}-healed", depth, score)
    write_costs(folder, tiny_8_healed=(40, FULL), tiny_6_healed=(32, (125.0, 122.0, 127.0)), tiny_3_healed=(15, HALF))
    return folder


def first_screen(run: Path) -> tuple[str, list[str]]:
    """The headline and the lines under it; the same everywhere."""
    page, markdown = secateur.report(run), run / "report.md"
    header = re.search("<header>(.*)</header>", page.read_text(encoding="utf-8"), re.DOTALL)
    assert header is not None
    lines = [line for line in plain(read_text(header[1])).splitlines() if line.strip()][1:]
    told = [plain(line) for line in secateur.read_verdict(run)]
    if told[-1].startswith("secateur serve"):
        *lines, here, command = lines
        assert here == "To use it, in the folder of this report:"
        assert command == "secateur serve models/" + Path(told[-1].rstrip("'")).name
        assert f"\n{command}\n" in markdown.read_text(encoding="utf-8")
        assert lines == told[:-1]
    else:
        assert lines == told
    in_markdown = re.sub(r"\\(.)", r"\1", plain(markdown.read_text(encoding="utf-8")))
    assert f"**{told[0]}**" in in_markdown
    assert all(line in in_markdown for line in lines)
    return told[0], told[1:]


def read_text(markup: str) -> str:
    return re.sub("<[^>]+>", "", markup).replace("&#39;", "'").replace("&amp;", "&")


def test_a_clear_winner_is_to_be_shipped_with_the_runner_up_and_the_command(run: Path) -> None:
    headline, (beside, second, command) = first_screen(run)
    shape = r"Ship tiny-6-healed: \S+ points \(−0\.\d to \+0\.\d, no significant difference\), 1.25 × as fast, 80 % of"
    assert re.match(shape, headline)
    assert beside.startswith("Points, speed and size are relative to tiny-8-healed, the full model, on your 2 tasks;")
    assert beside.endswith("ranges are 95 % intervals over texts, not over training seeds.")
    assert second.startswith("For half the cost: tiny-3-healed, −10.0 points (−10.")
    assert second.endswith("significantly worse), 2.10 × as fast, 38 % of the size.")
    assert command == f"secateur serve '{run}/models/tiny-6-healed'"
    card = (run / "models" / "tiny-6-healed" / "README.md").read_text(encoding="utf-8")
    assert plain(headline) in re.sub(r"\\(.)", r"\1", plain(card))
    other = (run / "models" / "tiny-3-healed" / "README.md").read_text(encoding="utf-8")
    assert "Ship" not in other


def test_a_model_of_half_the_size_that_is_slower_is_not_called_half_the_cost(run: Path) -> None:
    write_costs(
        run, tiny_8_healed=(40, FULL), tiny_6_healed=(32, (125.0, 122.0, 127.0)), tiny_3_healed=(15, (9.0, 8, 10))
    )
    _, rest = first_screen(run)
    assert not any("tiny-3-healed" in line for line in rest)


def test_what_is_not_decided_is_not_shipped(run: Path) -> None:
    write_model(run, "tiny-6-healed", 6, 0.80, own=0.05)
    headline, rest = first_screen(run)
    assert headline.startswith("Not decided yet: tiny-6-healed shows no significant difference (")
    assert re.search(r"up to \d\.\d points may be lost\. Score it on about \d+ × as many test queries", headline)
    assert rest[1].startswith("For half the cost of the full model: tiny-3-healed")
    assert not any("secateur serve" in line for line in rest)


def test_where_nothing_is_as_good_the_full_model_is_kept(run: Path) -> None:
    write_model(run, "tiny-6-healed", 6, 0.77)
    headline, _ = first_screen(run)
    assert headline.startswith("Keep tiny-8-healed: tiny-6-healed comes nearest, with −3.0 points (")
    assert headline.endswith("Train it for more steps, or on more data, and score it again.")


@pytest.mark.parametrize(
    ("study", "words"),
    [
        ({"max_params": 20e6}, "Ship tiny-3-healed, the best within your budget of 20.0 M parameters: −10.0 points ("),
        ({"max_params": 35e6}, "Ship tiny-6-healed: "),
        ({"max_latency_ms": 9}, "Ship nothing yet: no model here fits your budget of 9.0 ms for one text. "),
        ({"best": True}, "Ship tiny-6-healed, the best of those scored: "),
        ({"tolerance": 15.0}, "Ship tiny-3-healed: −10.0 points ("),
        ({"tolerance": 0.01}, "Not decided yet: tiny-6-healed shows no significant difference ("),
    ],
    ids=["only a loss fits", "as good fits", "nothing fits", "best", "tolerance", "strict tolerance"],
)
def test_a_budget_is_kept_to(run: Path, study, words: str) -> None:
    (run / "study.yaml").write_text(yaml.safe_dump(study))
    assert first_screen(run)[0].startswith(words)


@pytest.mark.parametrize("study", [{"max_params": 50e6}, {"max_latency_ms": 40}, {"best": True}])
def test_no_worse_cut_is_shipped_where_the_full_model_fits(run: Path, study) -> None:
    write_model(run, "tiny-6-healed", 6, 0.77)
    (run / "study.yaml").write_text(yaml.safe_dump(study))
    assert first_screen(run)[0].startswith("Keep tiny-8-healed: tiny-6-healed comes nearest, with −3.0 points (")


def test_where_the_best_is_asked_for_a_cut_that_is_as_good_does_not_lack_data(run: Path) -> None:
    write_model(run, "tiny-6-healed", 6, 0.798)
    (run / "study.yaml").write_text("best: true\n")
    headline = first_screen(run)[0]
    assert headline.startswith("Keep tiny-8-healed: tiny-6-healed comes nearest, with −0.20 points (−0.40 to −0.01, ")
    assert headline.endswith("Train it for more steps, or on more data, and score it again.")


def test_what_was_not_measured_is_not_said_to_be_over_the_budget(run: Path) -> None:
    (run / "study.yaml").write_text("max_params: 35.0e+6\n")
    write_costs(run, tiny_8_healed=(40, FULL))
    headline, _ = first_screen(run)
    assert headline.startswith("Ship nothing yet: no model here is known to fit your budget of 35.0 M parameters. What")


def test_all_that_is_said_is_relative_to_the_full_model_that_is_named(run: Path) -> None:
    """A smaller base model that is better than the larger one is beside that; its cuts are so in the verdict, too."""
    for depth, score in ((8, 0.85), (3, 0.60)):
        write_model(run, f"wee-{depth}-healed", depth, score, own=0.1)
    write_model(run, "tiny-6-healed", 6, 0.70)
    sizes = {"tiny_8_healed": (40, FULL), "tiny_6_healed": (32, FULL), "tiny_3_healed": (30, FULL)}
    write_costs(run, **sizes, wee_8_healed=(30, FULL), wee_3_healed=(10, FULL))
    _, (beside, second) = first_screen(run)
    assert beside.startswith("Points, speed and size are relative to tiny-8-healed, the full model")
    assert second.startswith("For half the cost of the full model: wee-3-healed, −20.0 points (")
    assert second.endswith("25 % of the size.")
    assert "the difference to the full model that the table of models names" in (run / "report.md").read_text("utf-8")


def test_with_profiles_alone_it_says_what_to_do_next(tmp_path: Path) -> None:
    write_profile(tmp_path)
    headline, _ = first_screen(tmp_path)
    assert headline.startswith("Nothing to compare yet: train the chosen cuts, and score them")


def add_baseline(run: Path, score: float, size: int | None) -> None:
    name = "static-1-baseline"
    write_model(run, name, 1, score, None, own=0.001)
    shutil.rmtree(run / "models" / name)  # it is not of this run
    (run / "study.yaml").write_text(f"baselines: [{name}]\n")
    costs = {"tiny_8_healed": (40, FULL), "tiny_6_healed": (32, FULL), "tiny_3_healed": (15, HALF)}
    write_costs(run, **costs, **({"static_1_baseline": (size, (9e3, 8.9e3, 9.1e3))} if size else {}))


def test_a_baseline_that_is_as_good_for_less_is_used_instead_of_a_cut(run: Path) -> None:
    add_baseline(run, 0.83, 8)
    headline, rest = first_screen(run)
    assert re.match(r"Use static-1-baseline, which needs no cut: \+3\.0 points \(.*significantly better\)", headline)
    assert headline.endswith("90.0 × as fast, 25 % of the size, compared with tiny-6-healed.")
    assert not any("secateur serve" in line for line in rest)


@pytest.mark.parametrize(("score", "size"), [(0.83, 400), (0.5, 8), (0.83, None)], ids=["larger", "worse", "unknown"])
def test_another_baseline_is_told_and_does_not_change_the_choice(run: Path, score: float, size: int | None) -> None:
    add_baseline(run, score, size)
    headline, rest = first_screen(run)
    assert headline.startswith("Ship tiny-6-healed: ")
    (told,) = [line for line in rest if line.startswith("Baseline static-1-baseline, compared with tiny-6-healed: ")]
    assert f"{100 * (score - 0.8):+.1f} points".replace("-", "−") in told
    assert ("of the size" in told) == (size is not None)


def test_an_untrained_full_model_is_no_easy_rival(run: Path) -> None:
    """Of a language model that was not made for vectors, any cut that is trained is better."""
    write_model(run, "tiny-8-zero-shot", 8, 0.2, None)
    write_model(run, "tiny-6-zero-shot", 6, 0.2, None)
    assert first_screen(run)[0].startswith("Ship tiny-6-healed: ")
    for part in ("models", "scores"):
        shutil.rmtree(run / part / "tiny-6-healed")
    assert first_screen(run)[0].startswith("Keep tiny-8-healed: tiny-3-healed comes nearest")


def test_the_heat_map_says_in_words_and_colours_what_differs(run: Path) -> None:
    page = read(secateur.report(run))
    cells = {a["data-heat"]: a["style"] for tag, a in page.tags if tag == "td" and "data-heat" in a}
    assert cells["loss"] == "--heat: 100%"
    rows = [row for row in page.rows("tiny-3-healed") if len(row) == 3]
    assert all(re.search(r"70\.0.*−10\.0 ▼ worse.*−10\.\d to −9\.\d", cell) for cell in rows[0][1:])
