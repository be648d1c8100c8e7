"""Tables and numbers as they are shown: alike on the terminal, in a page and in Markdown; no text is markup."""

from __future__ import annotations

import pytest
from rich.console import Console

import secateur
from secateur import document
from secateur.cli import terminal
from secateur.document import Cell, Table
from secateur.results import (
    ChangedRow,
    Comparison,
    CostRow,
    DepthScoreRow,
    DifferenceRow,
    OverlapRow,
    ScoreRow,
    Scores,
)
from test_figures import MADE, profile

SPACE = "\N{NO-BREAK SPACE}"


def on_terminal(table: Table) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table.to_rich())
    return captured.get()


def test_a_table_is_the_same_in_each_form_and_its_texts_are_no_markup() -> None:
    cells = [Cell("[b]<i>|x", tag="a*b"), Cell("1.0", ("0.5 to 1.5",), trend="worse")]
    table = Table("a <title>", ("name", "value", "empty"), [[*cells, "–"]]).filled()
    assert len(table.columns) == 2
    shown = on_terminal(table)
    assert "[b]<i>|x (a*b)" in shown and "1.0 (0.5 to 1.5 ▼)" in shown and "a <title>" in shown
    head, rule, row = table.to_markdown().splitlines()[2:]
    assert (head, rule) == ("| name | value |", "|---|---:|")
    assert row == r"| \[b\]&lt;i&gt;\|x (a\*b) | 1.0 (0.5 to 1.5 ▼) |"
    turned = table.transposed()
    assert (list(turned.columns), len(turned.rows), turned.rows[0][0]) == (["name", "[b]<i>|x"], 1, "value")


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (document.score, 0.5123, "51.2"),
        (document.score, None, "–"),
        (document.score, float("nan"), "–"),
        (document.signed, -0.02, "−2.0"),
        (document.signed, -0.0001, "0.0"),
        (document.percent, 0.991, f"99.1{SPACE}%"),
        (document.speed, 1234.5, "1,234"),
        (document.speed, 1.234, "1.23"),
        (document.duration, 0.0123, f"12.3{SPACE}ms"),
        (document.duration, 1.25, f"1.2{SPACE}s"),
        (document.duration, 61.0, f"61{SPACE}s"),
        (document.duration, 720.0, f"12{SPACE}min"),
        (document.duration, 9000.0, f"2.5{SPACE}h"),
        (document.count, 31_200_000, f"31.2{SPACE}M"),
        (document.count, 999_949, f"999.9{SPACE}k"),
        (document.count, 999_960, f"1.0{SPACE}M"),
        (document.byte_size, 999, f"999{SPACE}bytes"),
    ],
)
def test_numbers_are_printed_with_their_units(show, value: float | None, text: str) -> None:
    assert show(value) == text


@pytest.mark.parametrize(("models", "first"), [("ab", "task a b"), ("abc", "t model (m) average a 50.0 50.0")])
def test_of_scores_the_more_numerous_are_the_rows(models: str, first: str, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show_scores(Scores(MADE, tuple(ScoreRow(model, "t", "STS", "m", 0.5, 9, 1.0) for model in models)))
    words = capsys.readouterr().out.replace("\n", " ").split("intervals")[1].split()
    assert " ".join(words).startswith(first)
    assert words.count("50.0") == 2 * len(models)


def test_results_on_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    rows = tuple(DepthScoreRow("t[b]", "STS", "m", depth, 0.1 * depth) for depth in (1, 2, 3))
    table = profile([3.0, 1.0, 2.0], [0.1] * 3, task_scores=rows, notes=("a note",))
    terminal.show_profile(table)
    terminal.show_candidates(secateur.candidates(table))
    scores = [ScoreRow(model, "t[b]", "STS", "spearman", value, 9, 1.0) for model, value in (("a", 0.5), ("b", 0.6))]
    terminal.show_scores(Scores(MADE, tuple(scores)))
    cost = CostRow("a", 3, 10_000_000, 5_000_000, 40_000_000, 100.0, 90.0, 120.0, device="cpu", threads=2)
    difference = DifferenceRow("b", "a", "t[b]", "spearman", 0.6, 0.5, 0.1, 0.05, 0.2)
    changed = ChangedRow("b", "a", "one\x07 text", 0.3, ("lost",), ("gained",))
    overlap = OverlapRow("b", "a", 0.7, 10, 40, 0.9)
    terminal.show_comparison(Comparison(MADE, "a", ("a", "b"), (difference,), (overlap,), (changed,), (), (cost,)))
    shown = capsys.readouterr().out.replace(SPACE, " ")
    for words in ("2 (large)", "1.000 (0.900 to 1.100)", "30.0 (best)", "note: a note", "l3prune-small: loss 3.0"):
        assert words in shown
    for words in ("t[b] (spearman)", "60.0", "+10.0 (+5.0 to +20.0)", "significant", "10.0 M", "100 (90.0 to 120)"):
        assert words in shown
    kept = "b keeps 70.0 % of each text's 10 nearest texts; those that it finds are 90.0 % as similar (40 texts)"
    for words in (kept, "30 %  one� text", "- lost", "+ gained"):
        assert words in shown
