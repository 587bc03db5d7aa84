"""Holds agents that fail in every way, and some good ones. `meta.kind` of a row chooses one."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from megatron_rl.reward import Score


async def run(task, model):
    return await KINDS[task.meta["kind"]](task, model)


async def good(task, model):
    reply = await model.chat(task.messages)
    reply = await model.chat([*task.messages, reply.message, {"role": "user", "content": "and?"}])
    return 0.5 if reply.content else 0.25


async def unscored(task, model):
    await model.chat(task.messages)


async def scored(task, model):
    await model.chat(task.messages)
    return Score(2.0, "correct", "well done", {"speed": 1.5})


async def silent(task, model):
    return 1.0


async def raises(task, model):
    await model.chat(task.messages)
    raise RuntimeError("oh no")


async def raises_together(task, model):
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(raises(task, model))


async def exits(task, model):
    await model.chat(task.messages)
    sys.exit(3)


async def dies(task, model):
    await model.chat(task.messages)
    os._exit(7)


async def crashes(task, model):
    os.kill(os.getpid(), signal.SIGSEGV)


async def hangs(task, model):
    await model.chat(task.messages)
    await asyncio.sleep(10**6)


async def talks_and_hangs(task, model):
    print("I wait for the weather", flush=True)
    await asyncio.sleep(10**6)


async def blocks(task, model):
    await model.chat(task.messages)
    while True:
        pass


async def ignores_signals(task, model):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    await asyncio.sleep(10**6)


async def floods(task, model):
    await model.chat(task.messages)
    while True:
        print("x" * 10000)


async def eats(task, model):
    await model.chat(task.messages)
    kept = []
    while True:
        kept.append(bytearray(os.urandom(16)) * 2**20)


async def returns_text(task, model):
    await model.chat(task.messages)
    return "good"


async def returns_nan(task, model):
    return float("nan")


async def returns_itself(task, model):
    return model


async def talks_for_ever(task, model):
    while True:
        await model.chat(task.messages)


async def catches_everything(task, model):
    for _ in range(1000):
        with contextlib.suppress(Exception):
            await model.chat(task.messages)


async def asks_nonsense(task, model):
    for body in ({"n": 7}, {"stop": 5}, {"tools": 3}, {"tool_choice": "x"}):
        try:
            await model.chat(task.messages, **body)
        except Exception as error:
            print(error)
    await model.chat([])


async def other_key(task, model):
    model.api_key = "0" * 48
    await model.chat(task.messages)


async def closes_at_once(task, model):
    for _ in range(5):
        asking = asyncio.create_task(model.chat(task.messages))
        await asyncio.sleep(0)
        asking.cancel()
    await asyncio.sleep(0.05)
    return 1.0


async def changes_history(task, model):
    for number in range(3):
        await model.chat([{"role": "user", "content": f"{number}"}, *task.messages])
    return 1.0


async def leaves_a_process(task, model):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(10**6)"], start_new_session=True)
    Path(task.meta["note"]).write_text(str(child.pid))
    await model.chat(task.messages)
    return 1.0


async def leaves_a_daemon(task, model):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            Path(task.meta["note"]).write_text(str(os.getpid()))
            time.sleep(10**6)
        os._exit(0)
    os.wait()
    while not Path(task.meta["note"]).exists():
        await asyncio.sleep(0.01)
    return 1.0


async def needs_its_daemon(task, model):
    asked, answered = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(answered[1], os.read(asked[0], 5))
        os._exit(0)
    os.wait()
    await asyncio.sleep(3)  # what is not an agent's is ended within a second
    os.close(answered[1])
    os.write(asked[1], b"there")
    return float(os.read(answered[0], 5) == b"there")


async def forks_and_returns_twice(task, model):
    os.fork()
    return 1.0


async def starts_threads(task, model):
    for _ in range(20):
        threading.Thread(target=time.sleep, args=(10**6,)).start()
    await model.chat(task.messages)
    return 1.0


async def forges_its_result(task, model):
    Path(os.environ["MEGATRON_RL_RESULT"]).write_text("x" * 10**6)
    os._exit(0)


async def forges_a_text(task, model):
    Path(os.environ["MEGATRON_RL_RESULT"]).write_text('{"score": "abc"}')
    os._exit(0)


async def forges_a_reason(task, model):
    Path(os.environ["MEGATRON_RL_RESULT"]).write_text('{"score": 1, "reason": "nice"}')
    os._exit(0)


async def forges_nan(task, model):
    Path(os.environ["MEGATRON_RL_RESULT"]).write_text('{"score": NaN}')
    os._exit(0)


async def forges_a_key(task, model):
    Path(os.environ["MEGATRON_RL_RESULT"]).write_text('{"scores": 1}')
    os._exit(0)


async def ends_its_host(task, model):
    await model.chat(task.messages)
    os.kill(os.getppid(), signal.SIGKILL)
    await asyncio.sleep(10**6)


async def reads_the_runs_lines(task, model):
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, json.dumps({"ended": {"id": "0-0-0", "score": 100.0}}).encode() + b"\n")
        except OSError:
            continue
    return 1.0


KINDS = {name: value for name, value in globals().items() if asyncio.iscoroutinefunction(value) and name != "run"}
