"""From result files to tables, pictures and pages."""

import json
from dataclasses import replace

import bench_support as support
import pytest
from bench_support import TINY, altered

from aapo_fast.bench import head, report, results, tables
from aapo_fast.types import UserError


@pytest.fixture
def measured(tmp_path, quick_memory):
    """Two N of one head; one method is wrong, one has not enough memory, one is not here."""
    made = support.settings(
        ["exact", "naive", "torch", "liger-ce"],
        altered(support.one_per_cent_too_large),
        support.raises(MemoryError("no more"), "large"),
        notes=["GPU TESTS FAILED"],
        command="aapo-fast bench head --something",
    )
    folder = tmp_path / "results" / "here"
    folder.mkdir(parents=True)
    return head.measure([TINY, replace(TINY, rows=128)], made, folder / "head.json"), folder


def test_tables(measured):
    text = tables.case_table(measured[0].cases[0])
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    assert "wrong gradient" in lines["altered"] and "**1.0e-02**" in lines["altered"]
    assert "(" not in lines["altered"]  # no time
    assert "out of memory" in lines["large"]
    assert "1.00" in lines["3G, bare products"] and "1 MiB" in lines["ours, exact"]
    assert "torch linear_cross_entropy †" in lines
    assert "Not run. Liger fused linear CE: " in text and "Liger fused linear CE" not in lines
    short = tables.summary(measured[0])
    assert "| ours: exact |" in short and "64,16,211" in short and "128,16,211" in short
    assert tables.preamble(measured[0]).startswith("**GPU TESTS FAILED**")


def test_errors_at_fewer_rows_are_said(measured):
    case = replace(measured[0].cases[0], error_rows=32)
    assert "Errors were measured at N = 32" in tables.case_table(case)


def test_pages_are_written_between_their_markers(measured, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    found = list(results.find([tmp_path / "results"]))
    written = report.write_docs(found, docs)
    assert {path.name for path in written} == {"benchmarks.md", "benchmarks-here.svg"}
    page = docs / "benchmarks.md"
    assert "![time, memory and error](benchmarks-here.svg)" in page.read_text()
    assert (docs / "benchmarks-here.svg").read_text().startswith("<?xml")
    page.write_text("# Mine\n\nWritten by hand.\n\n" + page.read_text().split("\n", 1)[1] + "\nAfter.\n")
    report.write_docs(found, docs)
    text = page.read_text()
    assert text.startswith("# Mine\n\nWritten by hand.") and text.endswith("After.\n")
    assert text.count(report.BEGIN) == text.count(report.END) == 1 and text.count("## here") == 1
    page.write_text("no markers")
    with pytest.raises(UserError, match="has lost the lines"):
        report.write_docs(found, docs)


def test_beside_and_summaries(measured):
    result, folder = measured
    assert {path.name for path in report.write_beside(result, folder)} == {"head.md", "head.svg"}
    assert "Time, of 3G" in report.summaries([(folder / "head.json", result)])


def test_entropies_have_a_picture_too(quick_memory, tmp_path):
    made = support.settings(["exact"])
    cases = [TINY, replace(TINY, distribution="3 nats"), replace(TINY, distribution="flat")]
    picture = report.write_beside(head.measure(cases, made), tmp_path)[1]
    assert "mean entropy, nats" in picture.read_text() and "N, tokens" not in picture.read_text()


def test_files_that_are_not_results(measured, tmp_path):
    _, folder = measured
    (folder / "other.json").write_text('{"trl_seconds": [1]}')
    assert [path.name for path, _ in results.find([folder])] == ["head.json"]
    with pytest.raises(UserError, match="is not there"):
        list(results.find([tmp_path / "nowhere"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no result"):
        list(results.find([tmp_path / "empty"]))
    content = json.loads((folder / "head.json").read_text())
    for change, message in (({"schema": 99}, "another version"), ({"cases": [{"rows": []}]}, "not a complete result")):
        (folder / "bad.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(UserError, match=message):
            results.load(folder / "bad.json")
    (folder / "bad.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        results.load(folder / "bad.json")
