"""Tests reports in a real Chromium, at the width of a desktop and of a phone."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from chromium import Chromium
from made_runs import make_run, response_row, write_rows

from megatron_rl.report.build import run_report

DESKTOP, PHONE = (1280, 900), (390, 844)
PAYLOADS = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><!--<script>",
    "\x00\x07\x1b[31m\u202egnp.exe\u2066\u2028\ud800\u200b\ufeff",
    "x" * 1_000_000,
    "שלום עולם مرحبا بالعالم 5 + 5 = 10",
    "<b>%{x}</b><br><a href='javascript:window.hacked=1'>{{DATA}}</a> &lt;script&gt;",
)
# Every plot, not only those in view.
DRAW_ALL = (
    "document.querySelectorAll('details').forEach(e => e.open = true);"
    "document.querySelectorAll('.canvas').forEach(drawPlot);"
)


def open_report(
    browser: Chromium, runs: Sequence[Path], output: Path, size: tuple[int, int], dark: bool = False
) -> None:
    assert run_report(runs, output, None, []) == 0
    browser.open(output.as_uri(), *size, dark=dark, phone=size == PHONE)
    browser.wait_for("document.body.dataset.ready")


def check(browser: Chromium, output: Path, size: tuple[int, int]) -> None:
    """Check that the console is empty, that the page fetches nothing, and that it is not wider than the window."""
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith(("data:", "blob:"))] == [output.as_uri()]
    assert browser.value("document.documentElement.scrollWidth") <= size[0]
    assert browser.value("innerWidth") == size[0]  # a phone zooms out where something is wider


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_a_hostile_run_does_no_harm(browser: Chromium, tmp_path: Path, size: tuple[int, int]) -> None:
    run = make_run(tmp_path / "<img src=x onerror=window.hacked=1>", 3, model="<script>x</script>", texts=PAYLOADS)
    rows = [
        response_row(i, 1, text)
        | {"reason": text[:90], "details": text, "outcome": text[:90], "finish_reason": text[:9]}
        for i, text in enumerate(PAYLOADS)
    ]
    write_rows(run / "rollouts/step_000001.jsonl", rows)
    output = tmp_path / "report.html"
    open_report(browser, [run], output, size)
    browser.value(DRAW_ALL)
    for step in range(3):
        for group in range(3):
            for response in range(4):
                browser.value(
                    f"Object.assign(place, {{step: {step}, group: {group}, response: {response}}}); drawBrowser()"
                )
                browser.value("document.querySelector('.token')?.click()")
                assert browser.value("document.documentElement.scrollWidth") <= size[0]
    assert browser.value("window.hacked === undefined")
    check(browser, output, size)


def test_what_cannot_be_seen_is_shown_as_marks(browser: Chromium, tmp_path: Path) -> None:
    text = "a\x00\x07\x7f\x85\u202e\u2066\ud800\u200b\u200d\nb"
    run = make_run(tmp_path / "run", 2, texts=[text])
    open_report(browser, [run], tmp_path / "report.html", DESKTOP)
    browser.value("Object.assign(place, {group: 1}); drawBrowser()")
    shown = browser.value("[...document.querySelectorAll('#browser .prose')].at(-1).textContent")
    assert shown == "a\u2400\u2407\u2421U+0085U+202EU+2066U+D800U+200B\u200d\nb"


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_comparison_and_stages_draw_and_every_control_works(
    browser: Chromium, tmp_path: Path, size: tuple[int, int]
) -> None:
    runs = [
        make_run(tmp_path / f"{algorithm}-{seed}", 40, seed=seed, algorithm=algorithm)
        for algorithm in ("grpo", "c3po")
        for seed in (1, 2)
    ]
    runs.append(make_run(tmp_path / "second", 40, algorithm="gspo", model=str(runs[2] / "hf")))
    output = tmp_path / "report.html"
    open_report(browser, runs, output, size, dark=True)
    browser.value(DRAW_ALL)
    drawn = "[...plots.keys()].find(canvas => plots.get(canvas).title === 'Reward')"
    assert browser.value("[...document.querySelectorAll('#legend button')].map(b => b.textContent)") == [
        "grpo (2 runs)",
        "c3po (2 runs)",
        "gspo",
    ]
    # Two bands of two edges each, three lines, and the raw values of the single run.
    assert browser.value(f"{drawn}.data.length") == 2 * 2 + 3 + 1
    assert browser.value(f"{drawn}.layout.shapes.map(shape => shape.x0)") == [40]
    assert browser.value(f"{drawn}.layout.annotations.map(one => one.text)") == ["second →"]
    mean = browser.value("curve([0, 1], 'reward', 'x').y[0]")
    parts = browser.value("[0, 1].map(i => data.runs[i].curves.metrics.reward[0][0])")
    assert mean == pytest.approx(sum(parts) / 2)
    for control, value in (("view", "runs"), ("axis", "hours"), ("axis", "tokens"), ("smoothing", "0")):
        browser.value(f"at('{control}').value = '{value}'; at('{control}').dispatchEvent(new Event('change'))")
        browser.value(f"at('{control}').dispatchEvent(new Event('input'))")
        browser.value(DRAW_ALL)
    assert browser.value(f"{drawn}.data.length") == 5
    browser.value("at('stages').click(); document.querySelector('#legend button').click()")
    browser.value(DRAW_ALL)
    assert browser.value(f"{drawn}.data.length") == 4
    assert browser.value(f"{drawn}.layout.shapes.length") == 0
    check(browser, output, size)


def test_a_smoothed_curve_is_the_weighted_mean_of_what_came_before(browser: Chromium, tmp_path: Path) -> None:
    open_report(browser, [make_run(tmp_path / "run", 2)], tmp_path / "report.html", DESKTOP)
    half = "1 / Math.LN2"  # over so many steps a weight halves with every step
    assert browser.value(f"smooth([0, 1, 2, 3], [4, 1, null, 7], {half})") == pytest.approx(
        [4, (4 / 2 + 1) / (1 / 2 + 1), None, (4 / 8 + 1 / 4 + 7) / (1 / 8 + 1 / 4 + 1)]
    )


def test_tokens_are_shaded_by_their_difference_and_tell_their_numbers(browser: Chromium, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1, texts=["one two three four"])
    row = response_row(0, 0, "abcdef") | {"num_tokens": 6, "num_loss_tokens": 5, "policy_versions": {"3": 2, "4": 4}}
    write_rows(run / "rollouts/step_000000.jsonl", [row])
    trace = {
        "position": 0,
        "sample_index": 0,
        "tokens": list("abcdef"),
        "rollout_logprobs": [-1.0, -1.0, -1.0, -1.0, -3.0, -1.0],
        "train_logprobs": [-1.0004, -1.004, -0.96, -1.4, -1.0, None],
        "policy_versions": [[3, 2], [4, 4]],
        "optimizer_step": 0,
    }
    write_rows(run / "tokens/step_000000.jsonl", [trace])
    open_report(browser, [run], tmp_path / "report.html", DESKTOP)
    names = browser.value("[...document.querySelectorAll('#browser .prose .token')].map(t => t.className)")
    assert names == ["token d0", "token d1", "token d2", "token d3", "token d4", "token untrained"]
    assert browser.value("[...document.querySelectorAll('.version')].map(v => v.textContent)") == ["v3", "v4"]
    browser.value("document.querySelectorAll('#browser .prose .token')[4].click()")
    said = browser.value("document.querySelector('.said').textContent")
    assert said == "token 5 “e”: log-prob server -3, trainer -1, ratio 7.389; policy version 4"
    browser.value("document.querySelectorAll('#browser .prose .token')[5].click()")
    assert "not trained in this step" in browser.value("document.querySelector('.said').textContent")
    assert "cut: 5 of 6 tokens trained" in browser.value("document.querySelector('.badges').textContent")


def test_a_teachers_opinion_shades_tokens_until_a_button_is_pressed(browser: Chromium, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1)
    row = response_row(0, 0, "abcdef") | {"num_tokens": 6, "num_loss_tokens": 5, "teacher_kl": 0.775}
    write_rows(run / "rollouts/step_000000.jsonl", [row])
    trace = {
        "position": 0,
        "sample_index": 0,
        "tokens": list("abcdef"),
        "rollout_logprobs": [-1.0] * 6,
        "train_logprobs": [-1.004, *[-1.0004] * 4, None],
        "teacher_logprobs": [-1.05, -1.2, -0.4, -2.5, -4.5, -1.0],
        "policy_versions": [[3, 6]],
        "optimizer_step": 0,
    }
    write_rows(run / "tokens/step_000000.jsonl", [trace])
    open_report(browser, [run], tmp_path / "report.html", DESKTOP)
    shades = "[...document.querySelectorAll('#browser .prose .token')].map(t => t.className)"
    assert browser.value(shades) == [f"token d{level}" for level in (0, 1, 2, 3, 4, 0)]
    browser.value("document.querySelectorAll('#browser .prose .token')[3].click()")
    said = browser.value("document.querySelector('.said').textContent")
    assert said == (
        "token 4 “d”: log-prob server -1, trainer -1, ratio 0.9996; teacher -2.5, -1.5 for the token; policy version 3"
    )
    assert "teacher: 0.775 nats less per token" in browser.value("document.querySelector('.badges').textContent")
    browser.value("document.querySelector('#browser .note button').click()")
    assert browser.value(shades) == ["token d1", *["token d0"] * 4, "token untrained"]
    check(browser, tmp_path / "report.html", DESKTOP)


def test_what_the_policy_did_not_sample_is_shaded(browser: Chromium, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1)
    segments = [
        {"spans": [["call <b>", True], ["\u202e391", False]]},
        {"shared_tokens": 9, "prompt": "again", "spans": [["so", True]]},
    ]
    columns = {"num_turns": 2, "num_masked_tokens": 3, "segments": segments}
    rows = [response_row(i, 0, "so") | columns for i in (0, 4)]
    write_rows(run / "rollouts/step_000000.jsonl", rows)
    trace = {
        "position": 0,
        "sample_index": 0,
        "tokens": list("abcd"),
        "rollout_logprobs": [-1.0, None, -1.0, -1.0],
        "train_logprobs": [-1.0, None, None, -1.0],
        "policy_versions": [[3, 1], [None, 1], [3, 2]],
        "segments": [0, 2],
        "optimizer_step": 0,
    }
    write_rows(run / "tokens/step_000000.jsonl", [trace])
    open_report(browser, [run], tmp_path / "report.html", DESKTOP)
    parts = "[...document.querySelectorAll('#browser .prose')].at(-1).children"
    names = browser.value(f"[...{parts}].map(part => part.className)")
    assert names == ["token d0", "token others", "gap segment", "token untrained", "token d0"]
    assert browser.value("document.querySelectorAll('.version').length") == 0  # one version, whatever lies between
    browser.value("document.querySelectorAll('#browser .prose .token')[1].click()")
    said = browser.value("document.querySelector('.said').textContent")
    assert said == "token 2 “b”: not sampled by the policy, so never trained"
    assert "2 turns, 3 tokens of others" in browser.value("document.querySelector('.badges').textContent")
    browser.value("Object.assign(place, {group: 1}); drawBrowser()")
    assert browser.value(f"[...{parts}].map(part => [part.className, part.textContent])") == [
        ["policy", "call <b>"],
        ["others", "U+202E391"],
        ["gap segment", "a new segment: the first 9 tokens of its prompt are those before, then it goes on"],
        ["others", "again"],
        ["policy", "so"],
    ]
    check(browser, tmp_path / "report.html", DESKTOP)


def test_plots_are_drawn_when_they_come_into_view(browser: Chromium, tmp_path: Path) -> None:
    open_report(browser, [make_run(tmp_path / "run", 5)], tmp_path / "report.html", PHONE)
    browser.wait_for("document.querySelector('.canvas[data-drawn]')")
    last = "[...document.querySelectorAll('#section4 .canvas')].at(-1)"
    assert not browser.value(f"{last}.dataset.drawn")
    browser.value(f"{last}.scrollIntoView()")
    browser.wait_for(f"{last}.dataset.drawn")
