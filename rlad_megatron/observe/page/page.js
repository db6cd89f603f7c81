"use strict";
// The page as a whole: what it knows of the run, and the loop that asks what is new.

const POLL_MS = 2000;
const known = { metrics: { step: [] }, count: 0, restarts: 0, load: {}, load_version: -1, config_version: "" };

/** Append columns of new lines of metrics to those that are known; a key that one side lacks is null there. */
function addLines(news) {
  if (news.restarts !== known.restarts || news.after !== known.count) known.metrics = { step: [] };
  const before = known.metrics.step.length, added = news.metrics.step?.length ?? 0;
  for (const key of new Set([...Object.keys(known.metrics), ...Object.keys(news.metrics)])) {
    const old = known.metrics[key] ?? Array(before).fill(null);
    known.metrics[key] = old.concat(news.metrics[key] ?? Array(added).fill(null));
  }
  known.count = news.count;
  known.restarts = news.restarts;
  return added > 0 || before === 0;
}

function showFacts({ facts, news }) {
  page.facts = facts;
  document.title = document.getElementById("name").textContent = facts.name;
  document.getElementById("facts").replaceChildren(...facts.shown.map(([name, value]) => {
    const pair = element("div");
    pair.append(element("dt", "", name), element("dd", "", value));
    return pair;
  }));
  if (facts.config !== null) { // null: as it was
    known.config_version = facts.config_version;
    document.getElementById("configuration").hidden = !facts.config;
    document.querySelector("#configuration pre").textContent = facts.config;
  }
  const state = document.getElementById("state"), step = known.metrics.step.at(-1);
  state.textContent = facts.state;
  state.className = `state ${facts.state.split(" ")[0]}`;
  document.getElementById("progress").textContent =
    step === undefined ? "" : `step ${step}${facts.steps ? ` of ${facts.steps}` : ""}${facts.age ? `, ${facts.age}` : ""}`;
  document.getElementById("advisories").replaceChildren(...news.advisories.map((text) => element("li", "", text)));
  document.getElementById("no-metrics").textContent = page.live ? "No step has been written yet." : "No metrics were written.";
  document.getElementById("no-metrics").hidden = known.count > 0;
  const timeline = document.getElementById("timeline");
  timeline.hidden = !news.timeline;
  timeline.textContent = `${news.timeline} in the run folder shows what servers, teacher, trainer ranks and rewards did when. Open it in https://ui.perfetto.dev.`;
}

function showSummary(rows) {
  document.getElementById("summary").hidden = !rows.length;
  document.querySelector("#summary table").replaceChildren(...rows.map((cells) => {
    const row = element("tr");
    row.append(...cells.map((cell) => element("td", "", cell)));
    return row;
  }));
}

function showLost(error) {
  const state = document.getElementById("state");
  state.className = "state lost";
  state.textContent = error instanceof TypeError ? "no connection: `rlad watch` has ended, or its machine cannot be reached" : error.message;
}

async function update() {
  const answer = await source.news(known);
  const { news } = answer, changed = addLines(news);
  const loaded = news.load !== null; // null: as it was
  if (loaded) Object.assign(known, { load: news.load, load_version: news.load_version });
  showFacts(answer);
  if (changed) showSummary(news.summary);
  if (changed || loaded) drawCurves(known.metrics, known.load);
  await updateRollouts(news.rollouts, news.rollouts_version, news.subsets);
}

async function follow() {
  if (!document.hidden) await update().catch(showLost);
  if (page.live) setTimeout(follow, POLL_MS);
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawCurves(known.metrics, known.load));
follow();
