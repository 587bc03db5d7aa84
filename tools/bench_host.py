"""Measure what rank 0's processor does in a step of the paper's run, part by part, and what all GPUs would wait for it.

    python tools/bench_host.py [--sizes 1/64 1/32 1/16 1/8] [--router-replay] [--output OUT.json] [--rates HOST.toml]

The run's own sampler, pool, client, journal, schedule, rollouts file and send_work, against servers without a model and
a rank that only takes what it is sent (tools/host_stand_ins.py), each in a process of its own. A size is a share of the
paper's step: 8,192 responses of 12,800 tokens, 64 servers, 256 GPUs, and the seconds over which replies come. Prints a
table, with the law by which each part grows (seconds ~ size^law, a line through the logarithms), extrapolated to 8, 64
and 256 GPUs, and as a share of the step that the simulator predicts without rank 0. OUT has all of it as JSON; HOST the
tables for a file of rates (megatron_rl/simulation/rates.py), of tokens and of responses by least squares.

Seconds are those of the processor, which a busy machine changes little, but for the line "by the clock". docs/host.md
has a table and what it says.
"""

import argparse
import asyncio
import contextlib
import functools
import importlib
import json
import multiprocessing
import random
import shutil
import string
import sys
import tempfile
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tomli_w
from scipy.optimize import nnls

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from host_stand_ins import FIRST_REPLY, Replies, sink_rank, stand_in_servers  # noqa: E402

from megatron_rl.config.load import load_config  # noqa: E402
from megatron_rl.config.schema import RlConfig  # noqa: E402
from megatron_rl.lifeline import end_with_owner  # noqa: E402
from megatron_rl.simulation.rates import HostPart, Rates  # noqa: E402

PAPER = ROOT / "examples/ring_lite/paper_256gpu/stage1_math.toml"
SHAPE = ROOT / "examples/ring_lite/ling_lite_1_5/config.json"
RATES = ROOT / "examples/ring_lite/rates/h800_assumed.toml"
GPUS, PROMPTS, SAMPLES, TOKENS, SERVERS = 256, 512, 16, 12_800, 64
SHORT_TOKENS = 256  # of a point that tells what a response costs from what its tokens do
PROMPT_TOKENS = 200
SHOWN_GPUS = (8, 64, 256)

# Functions timed within the phase: module, name, part. The rest of the phase is reading replies.
TIMED = (
    ("megatron_rl.rollout.journal", "pack_carry", "journal"),
    ("megatron_rl.rollout.client", "decode_routed_experts", "routed_experts"),
    ("megatron_rl.train.orchestrator.collector", "schedule", "schedule"),
    ("megatron_rl.train.orchestrator.phase_metrics", "Phase.metrics", "phase_metrics"),
)
DECODER = ("megatron_rl.train.orchestrator.group_source", "response_decoder", "text")
READING, FILES, FILES_BESIDE, SEND = "reading_replies", "rollouts_file", "rollouts_file_beside", "send_work"
_REST_SECONDS, _REST_SHARE = 0.3, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Describes one phase to measure. num_tokens: of each response. phase_seconds: the time over which replies come."""

    gpus: int
    num_servers: int
    num_prompts: int
    num_tokens: int
    phase_seconds: float
    router_replay: bool

    @property
    def num_responses(self) -> int:
        return self.num_prompts * SAMPLES


class Clock:
    """Counts the processor's seconds by part, of whichever thread. What is called inside of another part counts for
    that."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._here = threading.local()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        if getattr(self._here, "busy", False):
            yield
            return
        self._here.busy, started = True, time.thread_time()
        try:
            yield
        finally:
            self._here.busy = False
            self.seconds[name] += time.thread_time() - started

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*arguments, **options)

        return run


def named(module: str, name: str) -> tuple[Any, str, Any]:
    """Find a function: return what holds it, its own name, and itself. SystemExit when there is no such name any
    more."""
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    try:
        for step in path:
            owner = getattr(owner, step)
        return owner, last, getattr(owner, last)
    except AttributeError:
        raise SystemExit(f"{module} has no {name} any more; correct TIMED in tools/bench_host.py") from None


def install(clock: Clock) -> None:
    """Let the package's own functions be timed, in this process."""
    for module, name, part in TIMED:
        owner, last, function = named(module, name)
        setattr(owner, last, clock.timed(part, function))
    owner, last, make = named(*DECODER[:2])
    setattr(owner, last, lambda *options: clock.timed(DECODER[2], make(*options)))


# One point, in a process of its own ----------------------------------------------------------------------------------


def write_model(model: Path) -> None:
    """Write a model directory without weights: Ling-lite's shape, and as many words as it has tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    model.mkdir()
    shutil.copy(SHAPE, model / "config.json")
    source = random.Random(0)
    vocabulary = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    while len(vocabulary) < json.loads(SHAPE.read_text(encoding="utf-8"))["vocab_size"] - 1:
        vocabulary["Ġ" + "".join(source.choices(string.ascii_lowercase, k=source.randint(2, 5)))] = None
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(model / "tokenizer.json"))
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": template}
    (model / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_rows(folder: Path, point: Point) -> None:
    """Write prompts of one length."""
    rows = (
        {"id": str(i), "domain": "math", "prompt": f"{i:08d}".ljust(PROMPT_TOKENS, "x"), "answer": "1"}
        for i in range(point.num_prompts)
    )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def config_of(point: Point, folder: Path, model: Path, urls: Sequence[str]) -> RlConfig:
    """Return the paper's configuration at this size, with answers that cost nothing to judge."""
    return load_config(
        RlConfig,
        PAPER,
        [
            *(f"model.path={model}", f"run_dir={folder / 'run'}", f"data.train={folder / 'rows.jsonl'}"),
            f"rollout.urls={json.dumps(urls)}",
            f"rollout.prompts_per_step={point.num_prompts}",
            f"rollout.router_replay={json.dumps(point.router_replay)}",
            f"budget.tokens={point.num_responses * point.num_tokens}",
            "budget.scope=global",
            *("rollout.servers=0", "rollout.sglang_arguments=[]", "sync.transport=disk", "parallel.expert=1"),
            *("reward.kind=exact", "reward.workers=1"),
        ],
    )


def replies_of(point: Point) -> Replies:
    shape = json.loads(SHAPE.read_text(encoding="utf-8"))
    routed = (shape["num_hidden_layers"], shape["num_experts_per_tok"], shape["num_experts"])
    return Replies(
        num_tokens=point.num_tokens,
        vocab_size=shape["vocab_size"] - 1,
        phase_seconds=point.phase_seconds,
        routed=routed if point.router_replay else None,
    )


def measured(point: Point, model: Path) -> dict[str, Any]:
    """Measure one step of rank 0 at this size."""
    end_with_owner()
    with (
        tempfile.TemporaryDirectory() as name,
        stand_in_servers(point.num_servers, replies_of(point)) as urls,
        sink_rank(f"{name}/store") as funnel,
    ):
        folder = Path(name)
        write_rows(folder, point)
        config = config_of(point, folder, model, urls)
        (folder / "run").mkdir()
        return asdict(point) | rank_zero(config, point, urls, funnel)


def rank_zero(config: RlConfig, point: Point, urls: Sequence[str], funnel: Any) -> dict[str, Any]:
    from megatron_rl.c3po.packing import cost_model
    from megatron_rl.families import load_architecture
    from megatron_rl.train.orchestrator import commands
    from megatron_rl.train.orchestrator.collector import Collector
    from megatron_rl.train.orchestrator.group_source import ServerGroups
    from megatron_rl.train.orchestrator.node_servers import NodeServers
    from megatron_rl.train.run.signals import StopSignals

    clock, layout, signals = Clock(), config.parallel.layout(point.gpus), StopSignals()
    install(clock)
    commands.dist = funnel
    servers = NodeServers(config, config.model.path, None, signals, dict.fromkeys(urls, ""))
    source = ServerGroups(config, layout, signals, servers)
    with contextlib.ExitStack() as ends:
        ends.callback(source.close)
        source.pool.assume(None, "0")
        collector = Collector(config, layout, cost_model(load_architecture(config.model.path)), source)
        ends.callback(collector.close)
        phase = Watch(source)
        memory = {"before": peak_bytes()}
        started = time.monotonic()
        with phase.watched():
            schedule, _ = collector.collect(0)
        collected = time.process_time(), time.thread_time(), time.monotonic()
        memory |= {"rollout": phase.peak, "plan": peak_bytes()}
        # Wait for what is written beside training, so that one is not taken for the other.
        collector.files.settle()
        at_rest, sending = time.process_time(), (time.process_time(), time.monotonic())
        commands.send_work(schedule.plan, schedule.samples, layout, None)
        send_processor, send_clock = time.process_time() - sending[0], time.monotonic() - sending[1]
        memory["send_work"] = peak_bytes()
        told = {url: json.load(urllib.request.urlopen(f"{url}/told")) for url in urls}
        main = {name: clock.seconds[name] for name in ("schedule", "phase_metrics")}
        between = collected[1] - phase.ended_main
        within = {name: seconds for name, seconds in clock.seconds.items() if name not in main}
        parts = {READING: phase.seconds - sum(within.values()), **within, **main}
        parts[FILES] = max(0.0, between - sum(main.values()))
        parts |= {SEND: send_processor, FILES_BESIDE: max(0.0, at_rest - collected[0])}
        last_reply = max(one["last_reply"] for one in told.values())
        return {
            "parts": parts,
            "from_last_reply_seconds": collected[2] - last_reply + send_clock,
            "from_last_reply_processor_seconds": collected[0] - phase.processor_at(last_reply) + send_processor,
            "phase_wall_seconds": phase.ended_wall - started,
            "loop_stall_seconds": phase.stall,
            "loop_stall_wall_seconds": phase.stall_wall,
            "num_requests": sum({one["process"]: one["num_requests"] for one in told.values()}.values()),
            "num_sent_bytes": funnel.num_bytes,
            "peak_bytes": memory,
        }


class Watch:
    """Watches the rollout phase: its processor time, how long the loop stood still, and the peak of memory."""

    def __init__(self, source: Any) -> None:
        self._source, self._groups = source, source.groups
        self._over = threading.Event()
        self.stall = self.stall_wall = self.seconds = self.ended_main = self.ended_wall = 0.0
        self.peak = 0
        self._beats: list[tuple[float, float]] = []  # of the clock and of this process's processor

    def processor_at(self, moment: float) -> float:
        """Return the processor's seconds that this process had used at a moment of the clock in the phase."""
        return float(np.interp(moment, *np.array(self._beats).T))

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        self._source.groups = self._run
        pulse = threading.Thread(target=lambda: self._source.run(self._pulse()))
        pulse.start()
        try:
            yield
        finally:
            self._over.set()
            pulse.join()

    def _run(self, *options: Any) -> Any:
        started = time.process_time()
        try:
            return self._groups(*options)
        finally:
            self.seconds = time.process_time() - started
            self.ended_main, self.ended_wall, self.peak = time.thread_time(), time.monotonic(), peak_bytes()
            self._beats.append((self.ended_wall, time.process_time()))
            self._over.set()

    async def _pulse(self) -> None:
        """Record the longest stretch that the loop gave to others, in seconds of its thread's processor and of the
        clock."""
        while not self._over.is_set():
            processor, clock = time.thread_time(), time.monotonic()
            self._beats.append((clock, time.process_time()))
            await asyncio.sleep(0.01)
            self.stall = max(self.stall, time.thread_time() - processor)
            self.stall_wall = max(self.stall_wall, time.monotonic() - clock - 0.01)


def peak_bytes() -> int:
    """Return the most memory that this process has had since the last call."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    with contextlib.suppress(OSError):  # forbidden in some containers: then it is the most so far
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return peak


# Laws fitted to the points -------------------------------------------------------------------------------------------


def law(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Return (a, b) of seconds = a size^b, the line of least squares through the logarithms."""
    slope, level = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return float(np.exp(level)), float(slope)


def host_rates(points: Sequence[dict[str, Any]]) -> dict[str, HostPart]:
    """Fit the seconds of a token and of a response of each part: least squares of relative errors, without negative
    terms."""
    kinds: Any = {FILES_BESIDE: "beside", **dict.fromkeys((FILES, SEND, "schedule", "phase_metrics"), "between")}
    names = dict.fromkeys(name for point in points for name in point["parts"])
    rates = {}
    scale = np.array([1e-6, 1e-3])
    for name in names:
        present = [point for point in points if point["parts"].get(name, 0.0) > 1e-3]
        if len(present) < 2:
            continue
        responses = np.array([point["num_prompts"] * SAMPLES for point in present])
        counts = np.stack([responses * [point["num_tokens"] for point in present], responses], 1)
        seconds = np.array([point["parts"][name] for point in present])
        found, _ = nnls(counts * scale / seconds[:, None], np.ones(len(seconds)))
        token, response = (float(f"{each:.3g}") for each in found * scale)
        rates[name] = HostPart(when=kinds.get(name, "rollout"), token_seconds=token, response_seconds=response)
    return rates


def predicted(gpus: int, host: dict[str, HostPart]) -> dict[str, Any]:
    """Return the simulator's step of the paper's run on so many GPUs, prompts and budget in proportion, with these
    parts."""
    from megatron_rl.plan.shape import shape_of
    from megatron_rl.simulation.forecast import forecast
    from megatron_rl.simulation.workload import assumed

    with contextlib.chdir(ROOT):
        options = [f"cluster.nodes={max(1, gpus // 8)}", f"rollout.prompts_per_step={PROMPTS * gpus // GPUS}"]
        config = load_config(RlConfig, PAPER, options)
        assert config.cluster is not None
        rates = load_config(Rates, RATES).model_copy(update={"host": host})
        return forecast(config, shape_of(config)[0], config.cluster, rates, assumed(config, config.cluster), 10)


def lines_of(sizes: Sequence[float], peaks: Sequence[dict[str, int]]) -> dict[str, np.ndarray]:
    """Fit, by part, the line of least squares through sizes and peaks of memory, which have a part that does not
    grow."""
    return {name: np.polyfit(sizes, [peak[name] for peak in peaks], 1) for name in peaks[0]}


def summary(points: Sequence[dict[str, Any]], host: dict[str, HostPart]) -> dict[str, Any]:
    """Sum up by part: microseconds of a token, law, and seconds at each number of GPUs. Add what all GPUs wait for."""
    whole = [point for point in points if point["num_tokens"] == TOKENS]
    sizes = [point["gpus"] / GPUS for point in whole]
    parts = {}
    for name in host:
        seconds = [point["parts"].get(name, 0.0) for point in whole]
        if min(seconds) > 1e-4:
            level, slope = law(sizes, seconds)
            tokens = [p["num_prompts"] * SAMPLES * TOKENS for p in whole]
            parts[name] = {
                "when": host[name].when,
                "microseconds_per_token": 1e6 * sum(seconds) / sum(tokens),
                "law": slope,
                "seconds": {gpus: level * (gpus / GPUS) ** slope for gpus in SHOWN_GPUS},
            }
    waits = {}
    for name in ("from_last_reply_processor_seconds", "from_last_reply_seconds"):
        level, slope = law(sizes, [point[name] for point in whole])
        waits[name] = {"law": slope, "seconds": {gpus: level * (gpus / GPUS) ** slope for gpus in SHOWN_GPUS}}
    steps = {gpus: predicted(gpus, host) for gpus in SHOWN_GPUS}
    return {
        "parts": parts,
        **waits,
        "loop_stall_seconds": max(point["loop_stall_seconds"] for point in whole),
        "peak_gb": {
            name: {gpus: float(np.polyval(line, gpus / GPUS)) / 1e9 for gpus in SHOWN_GPUS}
            for name, line in lines_of(sizes, [point["peak_bytes"] for point in whole]).items()
        },
        "step_seconds": {gpus: step["step_seconds"]["mean"] for gpus, step in steps.items()},
        "host_wait_seconds": {gpus: step["host_seconds"]["mean"] for gpus, step in steps.items()},
    }


def table(told: dict[str, Any]) -> str:
    """Write the summary as Markdown."""
    heads = " | ".join(f"{gpus} GPUs, s" for gpus in SHOWN_GPUS)
    lines = [f"| part | when | us per token | law | {heads} | of the step |", "|---|---|---:|---:|---:|---:|---:|---:|"]
    # The step that GPUs would take if rank 0 took no time.
    step = told["step_seconds"][GPUS] - told["host_wait_seconds"][GPUS]

    def line(name: str, when: str, each: str, slope: str, seconds: dict[int, float]) -> str:
        shown = " | ".join(f"{value:.3g}" for value in seconds.values())
        return f"| {name.replace('_', ' ')} | {when} | {each} | {slope} | {shown} | {seconds[GPUS] / step:.1%} |"

    for name, part in told["parts"].items():
        each, slope = f"{part['microseconds_per_token']:.3g}", f"{part['law']:.2f}"
        lines.append(line(name, part["when"], each, slope, part["seconds"]))
    for by, name in (("processor", "from_last_reply_processor_seconds"), ("clock", "from_last_reply_seconds")):
        last = told[name]
        title = f"from the last reply to the plan sent, by the {by}"
        lines.append(line(title, "", "", f"{last['law']:.2f}", last["seconds"]))
    lines.append(line("what GPUs wait for, simulated", "", "", "", told["host_wait_seconds"]))
    heads = " | ".join(f"{gpus} GPUs, GB" for gpus in SHOWN_GPUS)
    lines += ["", f"| peak memory of rank 0 | {heads} |", "|---|---:|---:|---:|"]
    for name, peaks in told["peak_gb"].items():
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(f'{value:.3g}' for value in peaks.values())} |")
    stall = told["loop_stall_seconds"]
    return "\n".join([*lines, "", f"longest stall of the event loop: {stall:.3f} s of its processor"]) + "\n"


def points_of(arguments: argparse.Namespace) -> list[Point]:
    """List the points to measure: the sizes, and the smallest once more with short responses."""
    found = []
    for size in sorted(arguments.sizes):
        if size * SERVERS < 1:
            raise SystemExit(f"--sizes {size}: the smallest is 1/{SERVERS}, with one server")
        for tokens in (SHORT_TOKENS, TOKENS) if size == min(arguments.sizes) else (TOKENS,):
            point = Point(
                gpus=round(GPUS * size),
                num_servers=round(SERVERS * size),
                num_prompts=round(PROMPTS * size),
                num_tokens=tokens,
                phase_seconds=float(arguments.phase_seconds * size),
                router_replay=arguments.router_replay,
            )
            found.append(point)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=Fraction, nargs="+", default=[Fraction(1, n) for n in (64, 32, 16)])
    parser.add_argument("--phase-seconds", type=float, default=300.0, help="of the whole size; a size takes its share")
    parser.add_argument("--router-replay", action="store_true", help="replies have Ling-lite's routed experts")
    parser.add_argument("--output", type=Path, default=Path("runs/bench_host.json"))
    parser.add_argument("--rates", type=Path, help="a TOML of [host] tables for a file of rates")
    arguments = parser.parse_args()
    measurements = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model")
        for point in points_of(arguments):
            # Each in a new process: memory that was given back once is not asked for again.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as one:
                measurements.append(one.submit(measured, point, Path(folder) / "model").result())
            shown = {name: round(seconds, 3) for name, seconds in measurements[-1]["parts"].items()}
            print(f"{point.num_responses} responses of {point.num_tokens} tokens: {shown}", file=sys.stderr)
    host = host_rates(measurements)
    told = summary(measurements, host)
    cores = {"cores": psutil.cpu_count(), "load": psutil.getloadavg()[0], "first_reply": FIRST_REPLY}
    rates = {name: part.model_dump() for name, part in host.items()}
    whole = {"machine": cores, "points": measurements, "summary": told, "host": rates}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if arguments.rates:
        arguments.rates.parent.mkdir(parents=True, exist_ok=True)
        sparse = {name: part.model_dump(exclude_defaults=True) for name, part in host.items()}
        arguments.rates.write_text(tomli_w.dumps({"host": sparse}), encoding="utf-8")
    print(table(told), end="")
    print(f"all of it is in {arguments.output}")


if __name__ == "__main__":
    main()
