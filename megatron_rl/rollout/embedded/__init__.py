"""Serves generation on CPUs and in tests, behind the same HTTP routes as SGLang.

`python -m megatron_rl.rollout.embedded --model-path DIR --port P` serves a model of any known family. It is an
implementation of its own in plain torch: it shares no code with the training side, so that the two check each other.

What a request gets (tokens and log-probs) does not depend, bit for bit, on what else is in the batch, on its slot
or on arrival order; `invariance.py` proves this on the running machine at every start.

    protocol.py    JSON bodies of /generate -> validated records; records -> JSON answers;  fields.py  its parts
    server.py      HTTP routes (starlette); one event loop;  update_lock.py  who waits for whom there
    in_flight.py   requests that are not answered yet;  streams.py  answers while they are generated
    engine.py      continuous batching in a thread of its own: what happens in which order
    commands.py    what other threads ask of it;  waiting.py  sequences without a slot
    slots.py       per-slot state of the running sequences, as arrays;  slot_memory.py  what is kept for their tokens
    prefix_cache.py  which slots hold which prompts
    runner.py      network and weights;  prefill.py, decode.py  the two kinds of passes through them
    model.py       the network;  cache.py  its KV cache;  sampling.py  log-probs and sampling
    weights.py     the packed weights;  packing.py  raw tensors <-> packed weights;  load.py  safetensors -> both
    answers.py     HTTP statuses for faults;  weight_routes.py  the routes that change or check weights
    updates.py     weights that arrive over a process group;  weight_requests.py  the bodies of those routes
    invariance.py  the start-up self-check
"""
