// The browser of responses: run, step, prompt, and the answers to it, token by token. After page.js.

const place = { run: 0, step: 0, group: 0, response: 0, by: "teacher" };
// Nats from which a token's log-prob by the trainer, or by a teacher, differs from the server's so much that it is shaded more darkly.
const LIMITS = { trainer: [0.001, 0.01, 0.1, 1], teacher: [0.1, 0.5, 1, 3] };
const judge = (trace) => (trace.teacher && place.by === "teacher" ? "teacher" : "trainer");

/** How a token is shaded. */
function level(by, other, rollout) {
  const difference = Math.abs(other - rollout);
  return LIMITS[by].filter((limit) => difference >= limit).length;
}

function outcomeOf(response) {
  const { outcome = "", num_tokens: all = 0, num_loss_tokens: trained = 0 } = response;
  if (outcome === "trained" && trained < all) return { sign: "◐", text: `cut: ${trained} of ${all} tokens trained`, kind: "cut" };
  if (outcome === "trained") return { sign: "●", text: `trained: all ${all} tokens`, kind: "trained" };
  if (outcome === "carried") return { sign: "↻", text: "carried: trained first in the next step", kind: "carried" };
  return { sign: "✕", text: label(outcome || "not trained"), kind: "dropped" };
}

const gap = (number, noun, where) => make("span", { className: "gap", textContent: `${Number(number).toLocaleString("en")} ${noun} left out; the whole is in ${where}` });
const segmentMark = (text) => make("span", { className: "gap segment", textContent: text });

/** A text that may have had its middle taken out. */
function prose(parts, where, kind = "") {
  const box = make("div", { className: `prose ${kind}`, dir: "auto" });
  write(box, parts[0]);
  if (parts.length > 1) {
    box.append(gap(parts[1], "characters", where));
    write(box, parts[2]);
  }
  return box;
}

/** A trajectory: what the policy sampled, and shaded what others wrote. */
function turns(spans, where, kind) {
  const box = make("div", { className: `prose ${kind}`, dir: "auto" });
  for (const [text, who, shared] of spans) {
    if (who === "gap") box.append(gap(text, "characters", where));
    else if (who === "segment") box.append(segmentMark(`a new segment: the first ${shared} tokens of its prompt are those before, then it goes on`));
    else box.append(write(make("span", { className: who }), text));
  }
  return box;
}

/** Tokens by their difference, with the policy's version where it changes. */
function traced(trace, where, kind, said) {
  const box = make("div", { className: `prose ${kind}`, dir: "auto" });
  const [head, left] = trace.gap ?? [Infinity, 0];
  const starts = new Set(trace.segments ?? []);
  const ends = [];
  trace.versions.reduce((sum, [version, count]) => (ends.push([sum + count, version]), sum + count), 0);
  const versionAt = (index) => (ends.find(([end]) => index < end) ?? [0, null])[1];
  const known = new Set(trace.versions.map(([version]) => version).filter((version) => version !== null));
  let version = known.size > 1 ? null : [...known][0] ?? null;
  trace.tokens.forEach((token, i) => {
    const index = i < head ? i : i + left;
    if (i === head) box.append(gap(left, "tokens", where));
    if (starts.has(index)) box.append(segmentMark("a new segment, with a prompt of its own"));
    const others = versionAt(index) === null;
    if (!others && versionAt(index) !== version) {
      version = versionAt(index);
      box.append(make("span", { className: "version", textContent: `v${version}` }));
    }
    const [train, rollout] = [trace.train[i], trace.rollout[i]];
    const both = train !== null && rollout !== null;
    const by = judge(trace);
    const teacher = trace.teacher?.[i] ?? null;
    const other = by === "teacher" ? teacher : train;
    const shade = others ? "others" : other === null ? "untrained" : rollout !== null ? `d${level(by, other, rollout)}` : "";
    const piece = write(make("span", { className: `token ${shade}` }), token);
    const numbers = both
      ? `server ${short(rollout)}, trainer ${short(train)}, ratio ${short(Math.exp(train - rollout))}`
      : `server ${short(rollout)}, not trained in this step`;
    const opinion = teacher !== null && rollout !== null ? `; teacher ${short(teacher)}, ${short(teacher - rollout)} for the token` : "";
    const told = others ? "not sampled by the policy, so never trained" : `log-prob ${numbers}${opinion}; policy version ${versionAt(index)}`;
    piece.told = `token ${index + 1} “${label(token)}”: ${told}`;
    box.append(piece);
  });
  const tell = (event) => {
    if (event.target.told === undefined && event.target.parentElement?.told === undefined) return;
    const piece = event.target.told === undefined ? event.target.parentElement : event.target;
    box.querySelector(".chosen")?.classList.remove("chosen");
    piece.classList.add("chosen");
    said.textContent = piece.told;
  };
  box.onpointerover = box.onclick = tell;
  return box;
}

function shadingLegend(trace) {
  const key = (name, text) => make("span", { className: "key" }, make("span", { className: `token ${name}`, textContent: "token" }), ` ${text}`);
  const by = judge(trace);
  const limits = LIMITS[by];
  const words = [`below ${limits[0]}`, ...limits.map((limit, i) => `from ${limit}${i === limits.length - 1 ? " nats" : ""}`)];
  const turn = { teacher: "trainer", trainer: "teacher" }[by];
  const change = make("button", { type: "button", textContent: `shade by the ${turn}`, onclick: () => { place.by = turn; drawBrowser(); } });
  return make("p", { className: "note" }, `Difference of the two log-probs, ${by} and server: `,
    ...words.map((text, i) => key(`d${i}`, text)), ...(by === "teacher" ? [] : [key("untrained", "not trained in this step")]),
    ...(trace.teacher ? [" ", change] : []),
    ...(trace.versions.some(([version]) => version === null) ? [key("others", "not sampled by the policy")] : []));
}

function responseCard(step, response) {
  const { text, kind } = outcomeOf(response);
  const where = `${step.file}, line ${response.line}`;
  const badge = (words, name = "") => make("span", { className: `badge ${name}`, textContent: label(words) });
  const badges = [badge(text)];
  if (response.reward !== undefined) badges.unshift(badge(`reward ${short(response.reward)}`, (response.reason ? response.reason === "correct" : response.reward > 0) ? "good" : "bad"));
  if (response.reason) badges.push(badge(response.reason));
  for (const [name, part] of Object.entries(response.parts ?? {})) badges.push(badge(`${name} ${short(part)}`));
  if (response.advantage !== undefined) badges.push(badge(`advantage ${short(response.advantage)}`));
  if (response.teacher_kl !== undefined) badges.push(badge(`teacher: ${short(response.teacher_kl)} nats less per token`));
  badges.push(badge(`${response.num_tokens ?? "?"} tokens`));
  if (response.num_turns !== undefined) badges.push(badge(`${response.num_turns} turns, ${response.num_masked_tokens ?? "?"} tokens of others`));
  if (response.finish_reason) badges.push(badge(`ended by ${response.finish_reason}`));
  const versions = Object.entries(response.policy_versions ?? {}).map(([version, count]) => `v${version}: ${count}`);
  if (versions.length) badges.push(badge(`sampled by policy ${versions.join(", ")} tokens`));
  const later = response.trace?.optimizer_step > 0;
  if (later) badges.push(badge(`trained in optimizer step ${response.trace.optimizer_step + 1} of the phase, whose weights did not sample it`));
  const said = make("div", { className: "said", textContent: "Point at a token, or tap it, for its numbers." });
  const card = make("div", {}, make("div", { className: "badges" }, ...badges));
  const answer = (name, text) => make("p", { className: "note" }, `${name}: `, write(make("span", { className: "answer" }), text));
  if (response.expected) card.append(answer("expected answer", response.expected));
  if (response.expected) card.append(answer("extracted answer", response.extracted ?? "none"));
  if (response.details) card.append(make("p", { className: "note" }, write(make("span", {}), response.details)));
  if (response.trace) card.append(traced(response.trace, where, kind, said), said, shadingLegend(response.trace));
  else if (response.spans) card.append(turns(response.spans, where, kind), make("p", { className: "note" }, make("span", { className: "others", textContent: "shaded" }), ": not sampled by the policy, so never trained"));
  else card.append(prose(response.text, where, kind));
  return card;
}

function drawBrowser() {
  const withRollouts = data.runs.map((run, index) => index).filter((index) => data.runs[index].rollouts.length);
  if (!withRollouts.includes(place.run)) place.run = withRollouts[0];
  const run = data.runs[place.run];
  const step = run.rollouts[place.step = Math.min(place.step, run.rollouts.length - 1)];
  const group = step.groups[place.group = Math.max(0, Math.min(place.group, step.groups.length - 1))];
  const go = (changes) => () => { Object.assign(place, changes); drawBrowser(); };
  const button = (text, title, changes, disabled) => make("button", { type: "button", textContent: text, title, ariaLabel: title, onclick: go(changes), disabled });
  const pager = make("div", { className: "pager" });
  if (withRollouts.length > 1) {
    const choice = make("select", { ariaLabel: "run", onchange: () => go({ run: Number(choice.value), step: 0, group: 0, response: 0 })() },
      ...withRollouts.map((index) => make("option", { value: index, textContent: label(data.runs[index].name), selected: index === place.run })));
    pager.append(choice);
  }
  const slider = make("input", { type: "range", min: 0, max: run.rollouts.length - 1, value: place.step, ariaLabel: "step" });
  slider.onchange = () => go({ step: Number(slider.value), response: 0 })();
  slider.oninput = () => { number.textContent = `step ${run.rollouts[slider.value].step}`; };
  const number = make("output", { textContent: `step ${step.step}` });
  pager.append(button("‹", "earlier step", { step: place.step - 1, response: 0 }, place.step === 0), number,
    button("›", "later step", { step: place.step + 1, response: 0 }, place.step === run.rollouts.length - 1), slider);
  const box = make("div", { className: "browser card" }, pager);
  at("browser").replaceChildren(box, make("p", { className: "note", textContent: `${run.rollouts.length} of ${run.num_rollout_files} steps are in this page, of each some prompts; all responses are in ${label(run.directory)}/rollouts.` }));
  if (!group) {
    box.append(make("p", { textContent: "No response of this step can be read." }));
    return;
  }
  const chosen = (tab, is) => {
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-selected", String(is));
    return tab;
  };
  const prompts = step.groups.map((one, i) => {
    const tab = button(`${i + 1}`, `prompt ${i + 1}`, { group: i, response: 0 }, false);
    return chosen(tab, i === place.group);
  });
  const chips = group.responses.map((response, i) => {
    const { sign, text } = outcomeOf(response);
    const chip = make("button", { type: "button", title: text, onclick: go({ response: i }), className: (response.advantage ?? 0) > 0 ? "up" : (response.advantage ?? 0) < 0 ? "down" : "" },
      make("span", { textContent: `${sign} ${short(response.reward)}` }), make("small", { textContent: response.advantage === undefined ? "–" : Number(response.advantage).toFixed(2) }));
    return chosen(chip, i === place.response);
  });
  const response = group.responses[place.response = Math.min(place.response, group.responses.length - 1)];
  const more = group.total > group.responses.length ? `, of which the first ${group.responses.length} are here` : "";
  box.append(make("div", { className: "chips" }, "prompt", ...prompts, make("span", { className: "note", textContent: `of ${step.num_groups} in this step` })),
    make("h4", { textContent: "Prompt" }), prose(group.prompt, step.file),
    make("h4", { textContent: `${group.total} responses${more}: reward, and advantage below it` }), make("div", { className: "chips answers" }, ...chips),
    make("p", { className: "note", textContent: "● trained  ◐ cut at the budget  ↻ carried into the next step  ✕ dropped" }),
    responseCard(step, response));
}
