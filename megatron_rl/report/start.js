// Puts the page together, after everything else has been defined.

document.title = at("title").textContent = label(data.title);
at("subtitle").textContent = label(data.subtitle);
drawFacts();
drawCurves();
if (data.runs.some((run) => run.rollouts.length)) drawBrowser();
else at("browser").append(make("p", { className: "text", textContent: "These runs have no rollouts/." }));
const links = [["runs", "What ran"], ...data.sections.map((section, i) => [`section${i}`, section.title]), ["rollouts", "Responses one by one"]];
at("contents").append(...links.map(([id, text]) => make("a", { href: `#${id}`, textContent: text })));
if (data.version) {
  const look = async () => {
    const reply = await fetch("version").catch(() => null);  // it may have ended
    if (reply?.ok && (await reply.text()) !== data.version) location.reload();
  };
  setInterval(look, 3000);
}
document.body.dataset.ready = performance.now().toFixed(0);
