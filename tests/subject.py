"""Holds a generation server under test, and the trainer's end of its update groups."""

import concurrent.futures
import contextlib
import functools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from tiny_model import tensors_of
from torch import Tensor
from until import wait_until

from megatron_rl.keys import bearer
from megatron_rl.rollout.server import EmbeddedServer, GenerationServer
from megatron_rl.rollout.update_group import broadcast, flatten, join, leave
from megatron_rl.stores import host_store

ROOT = Path(__file__).parents[1]
CONTEXT, SLOTS = 1024, 4
PROMPT = [5, 6, 7]
# The length of a response that a test aborts. One that may finish gets its server's `long_tokens`.
ENDLESS_TOKENS = 1000
FLAGS = (
    "--hidden-size 64 --layers 3 --experts 6 --moe-intermediate-size 32 --shared-experts 1 --first-k-dense-replace 1"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    path: Path
    tensors: dict[str, Tensor]


def make_models(folder: Path) -> tuple[Model, Model]:
    """Make two models of one shape that draw different tokens everywhere."""
    models = []
    for seed in (0, 1):
        path = folder / f"model{seed}"
        flags = [*FLAGS.split(), "--first-k-dense-replace", "1", "--max-position-embeddings", str(CONTEXT)]
        flags += ["--seed", str(seed), "--init-std", "0.12"]
        subprocess.run([sys.executable, ROOT / "tools/make_tiny_model.py", path, *flags], check=True)
        models.append(Model(path=path, tensors=tensors_of(path)))
    return models[0], models[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Says what one kind of server can do that another cannot."""

    seeds: bool  # sampling_seed repeats a response
    whole: bool  # an update that failed leaves the old weights as they were
    long_tokens: int  # what it draws in some seconds, long enough for a client to act meanwhile
    spare_tokens: int = 0  # of its context length beyond the longest sequence


class _HeldServer(GenerationServer):
    """Runs held_server.py in place of the embedded server."""

    def __init__(self, command: Sequence[object], log_path: Path, *arguments: Any, **more: Any) -> None:
        python, flag, module, *options = command
        assert (flag, module) == ("-m", "megatron_rl.rollout.embedded")
        command = [python, ROOT / "tests/held_server.py", log_path.with_name("hold"), *options]
        super().__init__(command, log_path, *arguments, **more)


class HeldServer(EmbeddedServer, _HeldServer):
    """Is an embedded server whose requests stand still while the file `hold` is there."""

    @property
    def hold(self) -> Path:
        return self.log_path.with_name("hold")


class Subject:
    """Holds a running server and its client. It serves `first` as version "0" at the start and after each `reset`."""

    def __init__(self, process: GenerationServer, models: tuple[Model, Model], kind: Kind) -> None:
        self.process, self.kind = process, kind
        self.first, self.second = models
        limits = httpx.Limits(max_connections=None)
        headers = bearer(process.key)
        self.http = httpx.Client(base_url=process.url, headers=headers, timeout=240, limits=limits, trust_env=False)
        self._pool = concurrent.futures.ThreadPoolExecutor(32)

    def close(self) -> None:
        self._pool.shutdown()
        self.http.close()
        self.process.stop()

    def reset(self) -> None:
        """Leave no request in flight and no session open, and load the first weights."""
        self.let_go()
        self.post("/continue_generation")
        self.post("/abort_request", abort_all=True)
        self.wait_idle()
        self.post("/end_weight_update")
        if self.version() != "0":
            assert self.load(self.first, "0").json()["success"]

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def generate(self, input_ids: Any, body: dict[str, Any] | None = None, **sampling: Any) -> Any:
        """Return the answer of /generate, with log-probs unless `body` says otherwise."""
        answer = self.post(
            "/generate", **{"input_ids": input_ids, "sampling_params": sampling, "return_logprob": True} | (body or {})
        )
        assert answer.status_code == 200, answer.text
        return answer.json()

    def start(self, *prompts: Any, rid: str | None = None, tokens: int = ENDLESS_TOKENS) -> "list[Future[Any]]":
        """Start one generate call for each prompt. Return when those that find a slot have drawn tokens.

        They do not end by themselves before `let_go`, where the server is one that can be held; with others the test
        has to be fast. rid: their ids are this and their number.
        """
        self.hold()
        calls = [
            self.later(
                self.generate,
                prompt,
                {"rid": f"{rid}{i}"} if rid else None,
                max_new_tokens=tokens,
                ignore_eos=True,
            )
            for i, prompt in enumerate(prompts)
        ]
        self.settle(calls)
        return calls

    def hold(self) -> None:
        """Let requests stand still once they have drawn some tokens, where that is possible."""
        if isinstance(self.process, HeldServer):
            self.process.hold.touch()

    def let_go(self) -> None:
        if isinstance(self.process, HeldServer):
            self.process.hold.unlink(missing_ok=True)

    def settle(self, calls: "Sequence[Future[Any]]" = ()) -> None:
        """Return when the server has these calls, and what was sent before and finds a slot draws tokens."""
        wait_until(
            lambda: self.in_flight() >= len(calls) or any(call.done() for call in calls),
            f"the server has {len(calls)} requests",
        )
        if not isinstance(self.process, HeldServer):
            time.sleep(0.3 if len(calls) >= SLOTS else 0.05)
        if len(calls) >= SLOTS:
            return
        # One that came later and draws tokens: then so do they. It leaves at once.
        for part in self.stream([3], max_new_tokens=ENDLESS_TOKENS, ignore_eos=True):
            if len(part["output_ids"]) >= 8:
                return

    def later(self, function: Any, *args: Any, **kwargs: Any) -> "Future[Any]":
        return self._pool.submit(function, *args, **kwargs)

    def stream(self, input_ids: Any, **sampling: Any) -> Iterator[dict[str, Any]]:
        body = {"input_ids": input_ids, "sampling_params": sampling, "return_logprob": True, "stream": True}
        with self.http.stream("POST", "/generate", json=body) as answer:
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    return
                if line:
                    yield json.loads(line.removeprefix("data: "))
        raise AssertionError("the stream ended without [DONE]")

    def scores(self, ids: list[int]) -> list[float]:
        """Return the log-probs of ids[1:]."""
        answer = self.generate(ids, {"logprob_start_len": 0}, max_new_tokens=0)
        return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]][1:]

    @functools.cached_property
    def next_tokens(self) -> Tensor:
        """Return the fp64 log-probs [V] of the token after PROMPT under the first weights, scored token by token."""
        vocab = json.loads((self.first.path / "config.json").read_text())["vocab_size"]
        answers = self.generate(
            [[*PROMPT, token] for token in range(vocab)], {"logprob_start_len": 0}, max_new_tokens=0
        )
        return torch.tensor([a["meta_info"]["input_token_logprobs"][-1][0] for a in answers], dtype=torch.float64)

    def version(self) -> str:
        return str(self.http.get("/model_info").json()["weight_version"])

    def load(self, model: Model, version: str, **more: Any) -> httpx.Response:
        """Load weights from disk, without flush_cache: it can end real SGLang when a request has just ended."""
        body = {"model_path": str(model.path), "weight_version": version, "flush_cache": False}
        return self.post("/update_weights_from_disk", **body | more)

    def wait_idle(self) -> None:
        wait_until(lambda: self.post("/flush_cache").status_code == 200, "the server is idle")

    def in_flight(self) -> int:
        """Count the requests that run or wait for a slot."""
        state = self.http.get("/server_info").json()["internal_states"][0]
        if "running" in state:
            return int(state["running"] + state["waiting"])
        (load,) = self.http.get("/v1/loads").json()["loads"]  # SGLang's
        return int(load["num_running_reqs"] + load["num_waiting_reqs"])


class Sender:
    """Is rank 0 of an update group with one server."""

    def __init__(self, server: Subject, name: str) -> None:
        self.server, self.name = server, name
        store = host_store("127.0.0.1", 2, 240)
        where = {"master_address": "127.0.0.1", "master_port": store.port, "rank_offset": 1, "world_size": 2}
        answer = server.later(server.post, "/init_weights_update_group", **where, group_name=name, backend="gloo")
        self._group: Any = join("127.0.0.1", store.port, 0, 2, name, "gloo", 240, store=store)
        assert answer.result().json()["success"], answer.result().text

    def announce(self, tensors: dict[str, Tensor], *, flat: bool = True, **more: Any) -> "Future[httpx.Response]":
        """Send the call that announces the tensors. Its answer comes after the broadcasts."""
        body = {
            "names": list(tensors),
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
            "shapes": [list(tensor.shape) for tensor in tensors.values()],
            "group_name": self.name,
            "load_format": "flattened_bucket" if flat else None,
            "flush_cache": False,
        }
        return self.server.later(self.server.post, "/update_weights_from_distributed", **body | more)

    def send(self, tensors: dict[str, Tensor], *, flat: bool = True, **more: Any) -> httpx.Response:
        answer = self.announce(tensors, flat=flat, **more)
        for payload in [flatten(list(tensors.values()))] if flat else tensors.values():
            broadcast(self._group, payload).wait()
        return answer.result()

    def leave(self) -> None:
        if self._group is not None:
            leave(self._group)
        self._group = None  # gloo closes its connections with the last reference


@contextlib.contextmanager
def sender(server: Subject, name: str = "weights") -> Iterator[Sender]:
    entered = Sender(server, name)
    try:
        yield entered
    finally:
        entered.leave()
        server.post("/destroy_weights_update_group", group_name=name)
