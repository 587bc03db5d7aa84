"""Tests that text is UTF-8 in every locale: a lint checks the code, and commands run in other locales."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in import stand_in

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import lint_encodings  # noqa: E402

CONFIG = """
# Überschrift: 数学题
run_dir = "{folder}/run"
reward.domains = {{"数学" = "math"}}
[teacher]
url = "{url}"
model = "teacher-1"
[data]
train = "{folder}/提示.jsonl"
[rollout]
prompts_per_step = 1
samples_per_prompt = 1
max_response_tokens = 64
"""


@pytest.fixture(scope="module", params=["ASCII", "ISO-8859-1"])
def locale_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return an environment with this locale, in which Python does not choose UTF-8 by itself."""
    environment = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    if request.param == "ASCII":
        return environment
    folder = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef"):
        command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / "latin1")]
        subprocess.run(command, capture_output=True, check=False)
    if not (folder / "latin1").exists():
        pytest.skip("localedef cannot make a locale of ISO-8859-1 here (Debian has it in the package locales)")
    return environment | {"LC_ALL": "latin1", "LOCPATH": str(folder)}


def run(environment: dict[str, str], *arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=600, check=False)
    told = (done.stdout + done.stderr).decode(errors="replace")
    assert done.returncode == 0, told[-3000:]
    return told


def test_the_locale_is_what_it_should_be(locale_of: dict[str, str]) -> None:
    told = run(locale_of, "-c", "import locale; print(locale.getencoding())").strip()
    assert told in ("ANSI_X3.4-1968", "ISO-8859-1")


def test_a_command_reads_and_writes_utf8(locale_of: dict[str, str], tmp_path: Path) -> None:
    row = {"id": "一", "domain": "数学", "prompt": "半是多少?", "answer": "0.5"}
    (tmp_path / "提示.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    with stand_in("teacher-1") as (url, handler):
        handler.replies += ["答案是 \\boxed{\\frac12}"]  # right in mathematics, and not the same text
        config = tmp_path / "config.toml"
        config.write_text(CONFIG.format(folder=tmp_path, url=url), encoding="utf-8")
        command = ("-m", "megatron_rl.cli", "rollout", config, "--set", "teacher.system=思考", "--output")
        run(locale_of, *command, tmp_path / "答.jsonl")
    assert [message["content"] for message in handler.asked[0][0]["messages"]] == ["思考", "半是多少?"]
    (found,) = map(json.loads, (tmp_path / "答.jsonl").read_text(encoding="utf-8").splitlines())
    assert (found["domain"], found["response"], found["reward"]) == ("数学", "答案是 \\boxed{\\frac12}", 1.0)


def test_curation_reads_and_writes_utf8(locale_of: dict[str, str], tmp_path: Path) -> None:
    rows = [{"domain": "数学", "prompt": f"{n} 的一半是多少?", "answer": str(n // 2)} for n in (2, 4)]
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "题.jsonl").write_text("".join(lines), encoding="utf-8")
    config = (
        f'# 注释\noutput = "{tmp_path}/出"\nworkers = 1\n[[source]]\npath = "{tmp_path}/题.jsonl"\npreset = "ours"\n'
    )
    (tmp_path / "config.toml").write_text(config, encoding="utf-8")
    assert "题.jsonl: 2 of 2 rows kept" in run(locale_of, ROOT / "tools/prepare_data.py", tmp_path / "config.toml")
    kept = (tmp_path / "出/kept.jsonl").read_text(encoding="utf-8").splitlines()
    assert {(row["domain"], row["prompt"]) for row in map(json.loads, kept)} == {
        (r["domain"], r["prompt"]) for r in rows
    }


def test_what_a_run_writes_is_utf8_also_where_no_command_started_it(locale_of: dict[str, str], tmp_path: Path) -> None:
    """Check the configuration and rollouts of a run, by the functions that write and read them."""
    run(locale_of, "-c", _WRITES, tmp_path)
    (row,) = map(json.loads, (tmp_path / "run/rollouts/step_000000.jsonl").read_text(encoding="utf-8").splitlines())
    assert (row["prompt"], row["prompt_id"]) == ("说", "一")
    report = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert json.dumps("数学")[1:-1] in report


_WRITES = """
import sys
from pathlib import Path
from made_runs import make_run
folder = Path(sys.argv[1]) / "run"
make_run(folder, 3)
from dataclasses import replace
from megatron_rl.data.prompts import Prompt
from megatron_rl.records import Group
from megatron_rl.report.build import run_report
from megatron_rl.rollout.sampler import Collected
from megatron_rl.train.orchestrator.phase_metrics import Phase
from samples import make_sample, make_schedule
group = Group(prompt_id=0, samples=(make_sample(0, 0, 5),))
phase = Phase(collected=Collected(kept=[group]), unneeded=[], stale=[], schedule=make_schedule([group]))
prompt = Prompt(id="\\u4e00", domain="\\u6570\\u5b66", prompt="?", answer="7")
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import RlConfig
from megatron_rl.train.run.step_files import StepFiles
path = folder / "rollouts/step_000000.jsonl"
files = StepFiles(load_config(RlConfig, folder / "config.toml", []))
files.write(path, phase.lines(lambda position: prompt, lambda domain: "math", lambda ids: "\\u8bf4"), "")
files.close()
config = (folder / "config.toml").read_bytes().decode()
(folder / "config.toml").write_bytes((config + '[reward.domains]\\n"\\u6570\\u5b66" = "math"\\n').encode())
run_report([folder], None, None, [])
"""


def test_the_project_opens_no_text_without_an_encoding() -> None:
    assert lint_encodings.main([]) == 0


@pytest.mark.parametrize(
    ("call", "found"),
    [
        ("open(path)", True),
        ('open(path, "rb")', False),
        ('open(path, mode="w")', True),
        ('open(path, "w", encoding="utf-8")', False),
        ("path.read_text()", True),
        ('path.read_text("utf-8")', False),
        ("read_text(path)", False),  # of parsing.py
        ('(folder / "x").write_text(text)', True),
        ('path.open("a")', True),
        ("path.open()", True),
        ('path.open("xb")', False),
        ("journal.open(step)", False),
        ("os.open(path, os.O_RDONLY)", False),
        ('os.fdopen(number, "w")', True),
        ("gzip.open(path)", False),
        ('gzip.open(path, "rt")', True),
        ("tempfile.NamedTemporaryFile()", False),
        ('tempfile.NamedTemporaryFile("w")', True),
        ("io.TextIOWrapper(raw)", True),
        ("subprocess.run(command, text=True)", True),
        ('subprocess.run(command, encoding="utf-8")', False),
        ("subprocess.run(command)", False),
    ],
)
def test_the_lint_knows_what_opens_text(call: str, found: bool) -> None:
    assert bool(list(lint_encodings.unspecified(f"import os\n{call}\n"))) is found
