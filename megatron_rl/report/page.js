// The data, how text gets onto the page, and what ran. Data are text: they reach the page by textContent only, and Plotly,
// which reads some HTML in its labels, by plain(). command.py, curves.py and rollouts.py say what the records hold.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const coarse = matchMedia("(pointer: coarse)").matches;

/** An element with properties and children; a string is a text node. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// Controls, lone surrogates, and what turns or hides text; not newline, tab and the joiners that scripts need.
const UNSEEN = /(?![\n\t\u200c\u200d])[\p{Cc}\p{Cs}\p{Cf}\p{Co}\p{Zl}\p{Zp}]/gu;

/** What stands for a character of UNSEEN. */
function seen(character) {
  const code = character.codePointAt(0);
  if (code < 32) return String.fromCharCode(0x2400 + code);
  return code === 127 ? "\u2421" : "U+" + code.toString(16).toUpperCase().padStart(4, "0");
}

/** Append a text, with what cannot be seen as marks. */
function write(element, text) {
  let from = 0;
  for (const found of text.matchAll(UNSEEN)) {
    element.append(text.slice(from, found.index), make("span", { className: "mark", textContent: seen(found[0]) }));
    from = found.index + found[0].length;
  }
  element.append(text.slice(from));
  return element;
}

/** A text as a label: short, one line, nothing hidden. */
const label = (text) => text.replace(UNSEEN, seen).replace(/\s+/g, " ").slice(0, 120);
/** The same for Plotly. */
const plain = (text) => label(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const short = (value) => value === null || value === undefined ? "–" : Number(value).toPrecision(4).replace(/\.?0+($|e)/, "$1");

function table(header, rows) {
  const cell = (value) => value instanceof Node ? make("td", {}, value)
    : make("td", { className: value.length > 24 ? "long" : "number", textContent: label(value) });
  const head = make("tr", {}, ...header.map((name) => make("th", { textContent: label(name), scope: "col" })));
  const body = rows.map((row) => make("tr", {}, ...row.map(cell)));
  return make("div", { className: "wide card" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
}

/** A share with its interval, as a number and as a bar. */
function meter({ value, low, high }) {
  const bar = make("div", { className: "meter" });
  const part = (from, to, name) => {
    const piece = make("i", { className: name });
    piece.style.left = `${100 * from}%`;
    piece.style.width = `${100 * Math.max(0.004, to - from)}%`;
    bar.append(piece);
  };
  part(0, value, "");
  part(low, high, "interval");
  return make("div", {}, `${(100 * value).toFixed(1)} % [${(100 * low).toFixed(1)}, ${(100 * high).toFixed(1)}]`, bar);
}

function drawFacts() {
  const place = at("facts");
  const names = [...new Set(data.runs.flatMap((run) => run.facts.map(([name]) => name)))];
  const fact = (run, name) => (run.facts.find(([other]) => other === name) ?? [name, "–"])[1];
  const shared = names.filter((name) => data.runs.every((run) => fact(run, name) === fact(data.runs[0], name)));
  const differing = names.filter((name) => !shared.includes(name));
  const tile = (name) => make("div", { className: "tile" }, make("dt", { textContent: name }), make("dd", { textContent: label(fact(data.runs[0], name)) }));
  place.append(make("dl", { className: "tiles" }, ...shared.map(tile)));
  if (data.runs.length > 1) place.append(table(["run", ...differing], data.runs.map((run) => [run.name, ...differing.map((name) => fact(run, name))])));
  if (data.evaluations.length) {
    const benchmarks = [...new Set(data.evaluations.flatMap((one) => Object.keys(one.benchmarks)))];
    const row = (one) => [one.name, ...benchmarks.map((name) => one.benchmarks[name] ? meter(one.benchmarks[name]) : "–")];
    place.append(make("h3", { textContent: "Accuracy" }), table(["evaluation", ...benchmarks], data.evaluations.map(row)));
    place.append(make("p", { className: "note", textContent: "avg@k on each benchmark, with 95 % intervals." }));
  }
  const keys = [...new Set(data.groups.flatMap((group) => Object.keys(group.differences)))];
  if (keys.length) {
    place.append(make("h3", { textContent: "What differs" }));
    place.append(table(["key", ...data.groups.map((g) => g.label)], keys.map((key) => [key, ...data.groups.map((g) => g.differences[key] ?? "–")])));
  }
  for (const run of data.runs) {
    const rows = run.changes.map(([key, value, usual]) => [key, value, usual]);
    place.append(make("details", {},
      make("summary", { textContent: data.runs.length > 1 ? `Configuration of ${label(run.name)}` : "Configuration" }),
      table(["not the default", "value", "default"], rows),
      ...(run.starts.length ? [table(["started again", "after steps", "changed"], run.starts)] : []),
      make("details", {}, make("summary", { textContent: "all of config.toml" }), write(make("pre", { className: "prose" }), run.config))));
  }
}
