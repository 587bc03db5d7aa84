"""Serves a hostile web page that attacks a generation server on the machine of the person who opens the page."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Every way in which a page can send something without being asked for permission, and those that ask first.
ATTACKS = """
const generate = {input_ids: [5], sampling_params: {max_new_tokens: 3, ignore_eos: true}};
const posts = [
  ["/generate", generate],
  ["/update_weights_from_disk", {model_path: MODEL, weight_version: "theirs"}],
  ["/pause_generation", {mode: "in_place"}],
  ["/release_memory_occupation", {tags: ["weights"]}],
  ["/abort_request", {abort_all: true}],
  ["/begin_weight_update", {}],
];
const gets = ["/flush_cache", "/server_info", "/model_info", "/weights_checker", "/v1/models"];

function form(path, method, type, name, value) {
  const frame = Object.assign(document.createElement("iframe"), {name: "frame" + document.forms.length});
  const made = Object.assign(document.createElement("form"),
    {action: SERVER + path, method, enctype: type, target: frame.name});
  made.append(Object.assign(document.createElement("input"), {name, value}));
  const loaded = new Promise(done => { frame.onload = done; setTimeout(done, 3000); });
  document.body.append(frame, made);
  made.submit();
  return loaded;
}

async function attack() {
  const tries = [];
  for (const [path, body] of posts) {
    const text = JSON.stringify(body);
    for (const mode of ["no-cors", "cors"])
      for (const type of ["text/plain", "application/x-www-form-urlencoded", "application/json"])
        tries.push(fetch(SERVER + path, {method: "POST", mode, body: text, headers: {"Content-Type": type}}));
    tries.push(fetch(SERVER + path, {method: "POST", mode: "no-cors", body: new Blob([text])}));
    navigator.sendBeacon(SERVER + path, text);
    navigator.sendBeacon(SERVER + path, new Blob([text], {type: "text/plain"}));
    tries.push(form(path, "post", "text/plain", text.slice(0, -1) + ', "ignored": "', '"}'));
    tries.push(form(path, "post", "multipart/form-data", "text", text));
  }
  for (const path of gets) {
    tries.push(fetch(SERVER + path, {mode: "no-cors"}), fetch(SERVER + path));
    tries.push(new Promise(done => { const i = new Image(); i.onload = i.onerror = done; i.src = SERVER + path; }));
    tries.push(form(path, "get", "", "a", "b"));
  }
  for (const path of ["/generate", "/v1/realtime"])
    tries.push(new Promise((done, failed) => {
      const socket = new WebSocket(SERVER.replace("http", "ws") + path);
      socket.onopen = () => failed("a WebSocket was opened");
      socket.onerror = socket.onclose = done;
    }));
  const found = await Promise.allSettled(tries);
  const readable = found.filter(one => one.value instanceof Response && one.value.type !== "opaque");
  return readable.map(one => [new URL(one.value.url).pathname, one.value.status]);
}
"""


@contextmanager
def hostile_page(server: str, model: Path) -> Iterator[str]:
    """Serve a page of another origin than `server` that has `attack()`, and yield its URL.

    model: weights that the page tries to load into the server.
    """
    names = f"const SERVER = {json.dumps(server)}, MODEL = {json.dumps(str(model))};"
    page = f"<!doctype html><title>cats</title><body><script>{names}{ATTACKS}</script>".encode()

    class Pages(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: object) -> None:
            pass

    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{site.server_port}/"
    finally:
        site.shutdown()
        site.server_close()
