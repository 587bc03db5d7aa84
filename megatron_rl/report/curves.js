// Curves: smoothed, over seeds, one stage after the other; drawn by Plotly when they come into view. After page.js.

const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const BORDERS = ["solid", "dashed", "dotted", "dashed", "dashed"];
const hidden = new Set();
const plots = new Map(); // canvas: its plot, once it came into view
const color = (index) => css(`--s${index % 8}`);
const longest = Math.max(...data.runs.map((run) => run.curves.x.at(-1) + 1));
const has = { seeds: data.groups.some((group) => group.members.length > 1), stages: data.runs.some((run) => run.parent !== null) };

/** Steps of the slider's place: 0, then from 1 to a fifth of the longest run. */
function smoothing() {
  const place = Number(at("smoothing").value) / 100;
  return place === 0 ? 0 : Math.max(1, longest / 5) ** place;
}

/** What is drawn in one colour: [{name, members, index}]. */
function series() {
  const all = at("view").value === "groups"
    ? data.groups.map((g) => ({ name: g.members.length > 1 ? `${g.label} (${g.members.length} runs)` : g.label, members: g.members }))
    : data.runs.map((run, index) => ({ name: run.name, members: [index] }));
  return all.map((one, index) => ({ ...one, index }));
}

/** Where a run begins on the axis, in its unit: where it left the run from whose model it started. */
function origin(run, axis) {
  if (!at("stages").checked || run.parent === null || run.offset === 0) return 0;
  const parent = data.runs[run.parent];
  const taken = run.offset - parent.offset;
  if (axis === "x") return origin(parent, axis) + taken;
  const last = parent.curves.x.findLastIndex((step) => step < taken);
  return origin(parent, axis) + (parent.curves[axis][Math.max(0, last)] ?? 0);
}

/** Exponentially weighted mean over about `over` steps, without a bias at the start. Gaps stay. */
function smooth(x, y, over) {
  if (over === 0) return y;
  let sum = 0, weight = 0, last = null;
  return y.map((value, i) => {
    if (value === null) return null;
    const decay = last === null ? 0 : Math.exp((last - x[i]) / over);
    [sum, weight, last] = [sum * decay + value, weight * decay + 1, x[i]];
    return sum / weight;
  });
}

/** {x, y, low, high, raw} of a metric. Of several runs: mean and range of their smoothed curves, bin by bin. */
function curve(members, metric, axis) {
  const runs = members.map((index) => data.runs[index]).filter((run) => run.curves.metrics[metric]);
  if (!runs.length) return null;
  const lines = runs.map((run) => {
    const [raw, low, high] = run.curves.metrics[metric];
    const start = origin(run, axis);
    const x = run.curves[axis].map((value) => value === null ? null : value + start);
    return { bins: run.curves.bins, x, raw, low, high, y: smooth(run.curves.x, raw, smoothing()) };
  });
  if (lines.length === 1) return lines[0];
  const bins = new Map();
  for (const line of lines) {
    line.bins.forEach((bin, i) => {
      if (line.y[i] === null) return;
      if (!bins.has(bin)) bins.set(bin, []);
      bins.get(bin).push([line.x[i], line.y[i]]);
    });
  }
  const found = [...bins.keys()].sort((a, b) => a - b).map((bin) => bins.get(bin));
  const mean = (points, part) => points.reduce((sum, point) => sum + point[part], 0) / points.length;
  const ys = (points) => points.map((point) => point[1]);
  return {
    x: found.map((points) => mean(points, 0)), y: found.map((points) => mean(points, 1)), raw: null,
    low: found.map((points) => Math.min(...ys(points))), high: found.map((points) => Math.max(...ys(points))),
  };
}

const faint = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, "0");

/** Traces of one line: band, raw values, and the smoothed line above them. */
function lineTraces(found, name, hue, dash, alone) {
  const traces = [];
  const still = { mode: "lines", hoverinfo: "skip", connectgaps: true };
  if (found.low) {
    traces.push({ ...still, x: found.x, y: found.low, line: { width: 0 } });
    traces.push({ ...still, x: found.x, y: found.high, line: { width: 0 }, fill: "tonexty", fillcolor: faint(hue, found.raw ? 0.11 : 0.18) });
  }
  const few = found.y.filter((value) => value !== null).length < 40;
  if (found.raw && smoothing() > 0) traces.push({ ...still, x: found.x, y: found.raw, line: { width: 1, color: faint(hue, alone ? 0.33 : 0.16) } });
  traces.push({ x: found.x, y: found.y, name: plain(name), mode: few ? "lines+markers" : "lines", marker: { size: 4 },
    line: { width: 2, color: hue, dash }, connectgaps: true, hoverlabel: { namelength: 40 } });
  return traces;
}

/** {data, layout} for Plotly. */
function figure(plot) {
  const axis = at("axis").value;
  const shown = series().filter((one) => !hidden.has(one.name));
  const ink = css("--ink"), soft = css("--soft"), line = css("--line");
  const grid = { gridcolor: line, zerolinecolor: line, linecolor: line, tickfont: { color: soft, size: 11 }, automargin: true, fixedrange: coarse };
  const layout = {
    margin: { l: 36, r: 8, t: 4, b: 34 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, family: "system-ui, sans-serif" },
    showlegend: false, hovermode: "x unified", hoverlabel: { bgcolor: css("--card"), bordercolor: line, font: { color: ink, size: 12 } },
    dragmode: coarse ? false : "zoom", shapes: [], annotations: [],
    xaxis: { ...grid, title: { text: { x: "step", tokens: "loss tokens", hours: "hours of training" }[axis], font: { size: 11, color: soft }, standoff: 6 } },
    yaxis: { ...grid, type: plot.kind === "log" ? "log" : "linear", rangemode: plot.kind === "zero" ? "tozero" : "normal", hoverformat: ".4~g", exponentformat: "SI", minexponent: 4 },
  };
  if (plot.kind === "log") Object.assign(layout.yaxis, { dtick: undefined, nticks: 6, exponentformat: "power" });
  const traces = [];
  if (plot.kind === "stack" && shown.length > 1) {
    // Areas of several runs would hide each other: bars of their means.
    const first = (member, metric) => (data.runs[member].curves.metrics[metric] ?? [[]])[0].filter((value) => value !== null);
    const mean = (values) => values.length ? values.reduce((a, b) => a + b, 0) / values.length : 0;
    const parts = plot.curves.map(({ metric }) => shown.map((one) => mean(one.members.flatMap((member) => first(member, metric)))));
    const rows = shown.flatMap((one, row) => parts.some((means) => means[row] > 0) ? [row] : []);
    plot.curves.forEach(({ label: part }, index) => traces.push({
      type: "bar", orientation: "h", x: rows.map((row) => parts[index][row]), y: rows.map((row) => plain(shown[row].name)), name: plain(part),
      marker: { color: color(index) }, hovertemplate: "%{x:.3~g} s",
    }));
    Object.assign(layout, { barmode: "stack", hovermode: "y unified" });
    layout.xaxis.title.text = "seconds per step, mean";
    Object.assign(layout.yaxis, { type: "category", autorange: "reversed", tickmode: "array", tickvals: rows.map((row) => plain(shown[row].name)) });
    layout.yaxis.ticktext = rows.map((row) => plain(shown[row].name.replace(/^(.{16}).{3,}$/, "$1…")));
    return { data: traces, layout };
  }
  const several = series().length > 1;
  for (const one of shown) {
    for (const [index, { label: part, metric }] of plot.curves.entries()) {
      const found = curve(one.members, metric, axis);
      if (!found) continue;
      const name = several ? (plot.curves.length > 1 ? `${one.name} · ${part}` : one.name) : part;
      if (plot.kind === "stack") traces.push({ x: found.x, y: found.y, name: plain(name), stackgroup: "phases", mode: "lines", line: { width: 0.5, color: color(index) }, fillcolor: faint(color(index), 0.55) });
      else traces.push(...lineTraces(found, name, color(several ? one.index : index), DASHES[several ? index % 5 : 0], !several));
    }
  }
  const xs = traces.flatMap((trace) => trace.x).filter((x) => x !== null);
  const [left, right] = xs.reduce(([low, high], x) => [Math.min(low, x), Math.max(high, x)], [Infinity, -Infinity]);
  if (left < right) layout.xaxis.range = [left, right]; // or else Plotly makes room for the names of stages
  const upright = (x, dash) => ({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color: soft, width: 1, dash } });
  data.runs.forEach((run, index) => {
    if (!shown.some((one) => one.members.includes(index))) return;
    const start = origin(run, axis);
    if (start >= left && start > 0 && !layout.shapes.some((shape) => shape.x0 === start)) {
      const y = 1 - 0.09 * layout.annotations.length;
      layout.shapes.push(upright(start, "dash"));
      layout.annotations.push({ x: start, xanchor: start > (left + right) / 2 ? "right" : "left", yref: "paper", y, yanchor: "top", showarrow: false,
        text: plain(run.name.slice(0, 28)) + (start > (left + right) / 2 ? " →" : ""), font: { size: 10, color: soft }, bgcolor: faint(css("--card"), 0.75) });
    }
    if (axis === "x") for (const step of run.resumed_at) layout.shapes.push(upright(start + step, "dot"));
  });
  return { data: traces, layout };
}

function drawPlot(canvas) {
  const { data: traces, layout } = figure(plots.get(canvas));
  const config = { displaylogo: false, responsive: true, displayModeBar: false, scrollZoom: false };
  Plotly.react(canvas, traces, layout, config);
  canvas.dataset.drawn = performance.now().toFixed(0);
}

const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    target.dataset.near = isIntersecting ? "yes" : "";
    if (isIntersecting && !target.dataset.drawn) drawPlot(target);
  }
}, { rootMargin: "500px" });

/** After a control has changed: what is in view now, the rest when it comes into view. */
function redraw() {
  for (const canvas of plots.keys()) {
    canvas.dataset.drawn = "";
    if (canvas.dataset.near) drawPlot(canvas);
  }
}

function swatch(hue, border) {
  const piece = make("span", { className: "swatch" });
  piece.style.borderTopColor = hue;
  piece.style.borderTopStyle = border;
  return piece;
}

function drawLegend() {
  const all = series();
  at("legend").replaceChildren();
  at("legend").hidden = all.length < 2;
  const lines = all.some((one) => one.members.length > 1) ? ["Of several runs: the mean, and a band from the lowest to the highest of them."] : [];
  if (data.width > 1) lines.push(`A point is the mean of ${data.width} steps; the band of a single run goes from the lowest to the highest of them.`);
  at("reading").textContent = lines.join(" ");
  for (const one of all) {
    const chip = make("button", { type: "button" }, swatch(color(one.index), "solid"), make("span", { textContent: label(one.name) }));
    chip.setAttribute("aria-pressed", String(!hidden.has(one.name)));
    chip.onclick = () => {
      hidden.has(one.name) ? hidden.delete(one.name) : hidden.add(one.name);
      drawLegend();
      redraw();
    };
    at("legend").append(chip);
  }
  for (const keys of document.querySelectorAll(".keys")) {
    const { curves, kind } = keys.plot;
    const several = all.length > 1 && kind !== "stack";
    const key = ({ label: part }, i) => make("span", {}, swatch(several ? css("--soft") : color(i), several ? BORDERS[i % 5] : "solid"), label(part));
    keys.replaceChildren(...(curves.length > 1 ? curves.map(key) : []));
  }
}

function drawSections() {
  data.sections.forEach((section, number) => {
    const cards = section.plots.map((plot) => {
      const canvas = make("div", { className: "canvas" });
      plots.set(canvas, plot);
      watcher.observe(canvas);
      return make("div", { className: "plot card" },
        make("h4", { textContent: label(plot.title) }, make("span", { textContent: plot.unit })),
        make("div", { className: "keys", plot }), canvas, make("p", { className: "note", textContent: plot.note }));
    });
    const id = `section${number}`;
    const text = make("p", { className: "text", textContent: section.text });
    const grid = make("div", { className: "plots" }, ...cards);
    const zero = section.zero.length ? [make("p", { className: "note", textContent: `0 throughout, and not drawn: ${section.zero.map(label).join(", ")}` })] : [];
    const title = make("h3", { textContent: section.title });
    if (section.closed) at("sections").append(make("details", { id }, make("summary", {}, title), text, grid));
    else at("sections").append(make("div", { id }, title, text, grid, ...zero));
  });
}

function drawCurves() {
  const over = () => { at("smoothed").textContent = smoothing() === 0 ? "off" : `${smoothing().toFixed(smoothing() < 10 ? 1 : 0)} steps`; };
  at("smoothing").value = longest > 20 ? 50 : 0;
  at("grouping").hidden = !has.seeds;
  at("view").value = has.seeds ? "groups" : "runs";
  at("chaining").hidden = !has.stages;
  at("smoothing").oninput = () => { over(); redraw(); };
  at("axis").onchange = at("stages").onchange = redraw;
  at("view").onchange = () => { hidden.clear(); drawLegend(); redraw(); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawLegend(); redraw(); });
  over();
  drawSections();
  drawLegend();
}
