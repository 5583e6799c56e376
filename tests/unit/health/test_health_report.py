"""The report: one line per finding, what to do below it, JSON with everything, the exit status."""

from __future__ import annotations

import json

from poet_megatron.health.report import FAIL, MANY_LINES, OK, SKIPPED, WARN, WIDTH, Finding, Report, to_json, to_text


def report(*findings: Finding) -> Report:
    return Report(3, {"a": (0, 1), "b": (2,)}, "gloo", list(findings), {"speed": 1.5}, 2.0)


def test_only_a_fail_makes_the_exit_status_1() -> None:
    assert report().exit_status == 0
    assert report(Finding("x", OK, ""), Finding("y", WARN, ""), Finding("z", SKIPPED, "")).exit_status == 0
    assert report(Finding("x", OK, ""), Finding("y", FAIL, "")).exit_status == 1


def test_lines_say_what_and_what_to_do() -> None:
    text = to_text(report(Finding("gpus", OK, "fine"), Finding("node pairs", FAIL, "b is cut off", "plug it in", (2,), ("b",))))
    lines = text.splitlines()
    assert lines[0] == "3 ranks on 2 nodes (a: 0-1; b: 2), gloo, 2 s"
    assert lines[2] == "ok       gpus        fine"
    assert lines[3:5] == ["FAIL     node pairs  b is cut off", "                     -> plug it in"]
    assert lines[-1].startswith("1 FAIL, 0 warn, 1 ok, 0 skipped: do not train")


def test_long_lines_are_wrapped_under_their_column() -> None:
    lines = to_text(report(Finding("gpus", WARN, "many words " * 40, "other words " * 40))).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert all(line.startswith(" " * 15) for line in lines[3:-2])


def test_the_sum_says_whether_to_train() -> None:
    assert "nothing speaks against training" in to_text(report(Finding("x", OK, "")))
    assert "warn lines say" in to_text(report(Finding("x", WARN, "")))


def test_many_lines_of_one_kind_are_cut_in_the_text_only() -> None:
    findings = [Finding("clocks", WARN, f"complaint {rank}", "", (rank,)) for rank in range(MANY_LINES + 4)]
    findings.insert(3, Finding("clocks", FAIL, "another kind"))
    text = to_text(report(*findings, Finding("last", OK, "end")))
    assert f"complaint {MANY_LINES - 1}" in text and f"complaint {MANY_LINES}" not in text
    assert f"4 more lines like these, about ranks {MANY_LINES}-{MANY_LINES + 3} (--json has all)" in text
    assert "another kind" in text and "end" in text and "4 more" in text and f"{MANY_LINES + 4} warn" in text
    assert len(json.loads(to_json(report(*findings)))["findings"]) == MANY_LINES + 5


def test_a_few_lines_of_one_kind_are_all_shown() -> None:
    findings = [Finding("clocks", WARN, f"complaint {rank}", "", (rank,)) for rank in range(MANY_LINES)]
    text = to_text(report(*findings))
    assert "more lines" not in text and f"complaint {MANY_LINES - 1}" in text


def test_json_has_blame_and_figures() -> None:
    found = json.loads(to_json(report(Finding("gpus", FAIL, "broken", "mend it", (2,), ("b",)))))
    assert found["ok"] is False and found["world_size"] == 3 and found["nodes"] == {"a": [0, 1], "b": [2]}
    assert found["findings"] == [{"check": "gpus", "status": "FAIL", "what": "broken", "fix": "mend it", "ranks": [2], "nodes": ["b"]}]
    assert found["measured"] == {"speed": 1.5}


def test_ranks_that_did_not_come_are_counted() -> None:
    assert to_text(Report(4, {"a": (0, 1)}, seconds=60)).startswith("4 ranks, 2 came, on 1 node (a: 0-1), 60 s")


def test_many_nodes_are_not_all_listed() -> None:
    text = to_text(Report(20, {f"n{number}": (number,) for number in range(20)}))
    assert "n7: 7" in text and "n8" not in text and "and 12 more" in text
