"use strict";
// The list of sample rollouts, a page of it at a time, and the one that is looked at.

const PAGE_ROWS = 50;
const rolloutList = { start: 0, found: 0, known: -1, chosen: null, asked: 0, opened: 0, subsets: [] };
const filters = document.getElementById("filters");

async function listRollouts() {
  if (!filters.checkValidity()) return;
  const asked = ++rolloutList.asked; // only the answer to the last question counts
  const wanted = Object.fromEntries(["text", "solved"].map((name) => [name, filters.elements[name].value.trim()]));
  const { step, subset } = filters.elements;
  wanted.step = step.value && step.valueAsNumber;
  if (subset.selectedIndex > 0) wanted.subset = subset.value; // a subset may have no name
  const { found, rows } = await source.rollouts(wanted, rolloutList.start, PAGE_ROWS);
  if (asked !== rolloutList.asked) return;
  rolloutList.found = found;
  document.getElementById("rows").replaceChildren(...rows.map(rolloutRow));
  document.getElementById("found").textContent = `${found.toLocaleString("en")} rollout${found === 1 ? "" : "s"}`;
  const last = Math.min(rolloutList.start + PAGE_ROWS, found);
  document.getElementById("place").textContent = found ? `${rolloutList.start + 1}–${last}` : "none";
  document.getElementById("newer").disabled = rolloutList.start === 0;
  document.getElementById("older").disabled = last >= found;
  if (rolloutList.chosen === null && rows.length) await showRollout(rows[0]);
}

const isChosen = ({ file, number }) => rolloutList.chosen?.file === file && rolloutList.chosen?.number === number;

function rolloutRow(entry) {
  const item = element("li"), button = element("button"), head = element("div", "row-head");
  button.type = "button";
  head.append(element("b", "", `Step ${entry.step}`), element("span", entry.solved ? "good" : "bad", entry.solved ? "solved" : "not solved"),
    element("span", "soft", `${entry.tokens} tokens${entry.finish_reason === "length" ? ", cut off" : ""}`),
    element("span", "soft", entry.subset));
  button.append(head, element("div", "row-text", `… ${entry.excerpt}`));
  button.setAttribute("aria-current", isChosen(entry));
  button.addEventListener("click", () => showRollout(entry, button).catch(showLost));
  item.append(button);
  return item;
}

async function showRollout(entry, button = document.querySelector("#rows button")) {
  const opened = ++rolloutList.opened;
  const rollout = await source.rollout(entry);
  if (opened !== rolloutList.opened) return;
  rolloutList.chosen = entry;
  for (const other of document.querySelectorAll("#rows button")) other.setAttribute("aria-current", other === button);
  const tags = element("div", "tags");
  const add = (text, style = "") => text && tags.append(element("span", style, text));
  add(`Step ${rollout.step}`);
  add(rollout.subset, "soft");
  add(`Reward ${number(rollout.reward)}`);
  add(`Advantage ${number(rollout.advantage)}`);
  add(rollout.solved ? "solved" : "not solved", rollout.solved ? "good" : "bad");
  if (rollout.finish_reason === "length") add("cut off at max_tokens", "bad");
  add(rollout.id, "soft");
  const parts = [tags, element("span", "soft", "Prompt"), element("pre", "", rollout.prompt)];
  if (rollout.answer) parts.push(element("span", "soft", "Gold answer"), element("pre", "", rollout.answer));
  parts.push(element("span", "soft", "Response"));
  if (rollout.shortened) parts.push(element("span", "soft", ` (${rollout.shortened})`));
  document.getElementById("detail").replaceChildren(...parts, tokenView(rollout));
}

/** Called with each news. The list is asked for again only if it can have changed, and stays at the reader's place. */
async function updateRollouts(count, version, subsets) {
  document.getElementById("rollout-section").hidden = !count;
  if (version === rolloutList.known) return;
  rolloutList.known = version;
  const select = filters.elements.subset;
  if (JSON.stringify(subsets) !== JSON.stringify(rolloutList.subsets)) {
    const chosen = select.selectedIndex > 0 ? subsets.indexOf(select.value) : -1;
    rolloutList.subsets = subsets;
    select.replaceChildren(new Option("all subsets", ""), ...subsets.map((name) => new Option(name || "(none)", name)));
    select.selectedIndex = chosen + 1;
    select.hidden = subsets.length < 2;
  }
  await listRollouts();
}

function turnPage(pages) {
  rolloutList.start = Math.max(0, rolloutList.start + pages * PAGE_ROWS);
  document.getElementById("rows").scrollTop = 0;
  listRollouts().catch(showLost);
}

let typing = 0;
filters.addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => {
    if (!filters.reportValidity()) return; // a step is a whole number
    rolloutList.start = 0;
    listRollouts().catch(showLost);
  }, 200);
});
filters.addEventListener("submit", (event) => event.preventDefault());
document.getElementById("newer").addEventListener("click", () => turnPage(-1));
document.getElementById("older").addEventListener("click", () => turnPage(1));
