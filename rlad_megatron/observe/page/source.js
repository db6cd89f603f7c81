"use strict";
// Where the page gets its data: from `rlad watch`, which follows a run, or from the report itself.

const page = JSON.parse(document.getElementById("data").textContent);

const liveSource = {
  async ask(path, query) {
    const answer = await fetch(`${path}?${new URLSearchParams(query)}`, { cache: "no-store" });
    if (answer.status === 404 && path === "news") throw new Error("`rlad watch` was started again: open the address that it prints now");
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  },
  news({ count, restarts, load_version, config_version }) {
    return this.ask("news", { after: count, restarts, load: load_version, config: config_version });
  },
  rollouts(wanted, start, size) { return this.ask("rollouts", { ...wanted, start, size }); },
  rollout(entry) { return this.ask("rollout", { file: entry.file, number: entry.number }); },
};

const frozenSource = {
  async news() { return page.answer; },
  async rollouts(wanted, start, size) {
    const text = wanted.text.toLowerCase();
    const found = page.rollouts.filter(({ entry, rollout }) =>
      (!text || `${rollout.prompt}\n${rollout.response}\n${rollout.id}`.toLowerCase().includes(text)) &&
      (wanted.step === "" || entry.step === wanted.step) &&
      (!wanted.solved || String(entry.solved) === wanted.solved) &&
      (wanted.subset === undefined || entry.subset === wanted.subset));
    return { found: found.length, rows: found.slice(start, start + size).map((it) => it.entry) };
  },
  async rollout(entry) {
    return page.rollouts.find((it) => it.entry.file === entry.file && it.entry.number === entry.number).rollout;
  },
};

const source = page.live ? liveSource : frozenSource;

/** An element with text, never HTML: responses may hold anything. */
function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== "") made.textContent = text;
  return made;
}
