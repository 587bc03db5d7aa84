#!/usr/bin/env python
"""Measure a report of a long made-up run: how long it takes to write, how large it is, when Chromium shows it, as JSON.

    python tools/bench_report.py [--steps 10000] [--rounds 5]

Times in the browser count from the start of navigation: `load` to the load event, `first_plot` to the first plot drawn.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/browser")]

from chromium import Chromium, executable  # noqa: E402
from made_runs import make_run  # noqa: E402

from megatron_rl.errors import exit_code  # noqa: E402
from megatron_rl.report.build import run_report  # noqa: E402

# A response of about a thousand tokens.
TEXT = "Let x be 3. Then 2x + 4 = 10, so the answer is \\boxed{10}. " * 68
LOADED = "performance.getEntriesByType('navigation')[0].loadEventEnd"
DRAWN = "Math.min(...[...document.querySelectorAll('.canvas[data-drawn]')].map(c => Number(c.dataset.drawn)))"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if executable() is None:
        raise ValueError("no Chromium is installed; run `make install-browser`")
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "run", arguments.steps, texts=[TEXT], every=max(1, arguments.steps // 100))
        started = time.perf_counter()
        run_report([run], None, None, [])
        wrote = time.perf_counter() - started
        page = run / "report.html"
        loads, draws = [], []
        browser = Chromium()
        try:
            for _ in range(arguments.rounds):
                browser.open(page.as_uri(), 1280, 900)
                browser.wait_for("document.querySelector('.canvas[data-drawn]')")
                loads.append(browser.value(LOADED) / 1000)
                draws.append(browser.value(DRAWN) / 1000)
                assert not browser.complaints(), browser.complaints()
        finally:
            browser.close()
        told = {
            "steps": arguments.steps,
            "write_seconds": round(wrote, 2),
            "page_megabytes": round(page.stat().st_size / 1e6, 2),
            "load_seconds": {"median": round(median(loads), 2), "worst": round(max(loads), 2)},
            "first_plot_seconds": {"median": round(median(draws), 2), "worst": round(max(draws), 2)},
        }
    print(json.dumps(told, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(Path(__file__).name, main))
