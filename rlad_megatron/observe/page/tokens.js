"use strict";
// A response token by token: coloured by one figure, all figures under the pointer.

const BLUE = "59,130,214", ORANGE = "224,128,58", GREEN = "47,163,124", RED = "212,85,106";
const wash = (colour, share) => (share > 0.02 ? `rgba(${colour},${(0.08 + 0.72 * Math.min(share, 1)).toFixed(3)})` : "");
const number = (value) => (value === undefined || value === null ? "–" : String(Number(Number(value).toPrecision(4))));

/** All that is known of token i of a rollout. A missing figure is undefined. */
function tokenFigures(rollout, i) {
  const at = (name) => rollout[name]?.[i] ?? undefined;
  const [old, sampler, student, teacher] = ["old_log_probs", "log_probs", "student_log_probs", "teacher_log_probs"].map(at);
  const gap = at("teacher_gap") ?? (teacher === undefined || student === undefined ? undefined : student - teacher);
  return {
    student, old, teacher, sampler, gap,
    mismatch: at("mismatch"),
    ratio: at("ratio"), clipped: at("clipped"), clamped: at("clamped"), entropy: at("entropy"),
    advantage: page.facts.objective === "on_policy_kl" ? (gap === undefined ? undefined : -gap) : rollout.advantage,
  };
}

// Each view: colour of a token, whether it is underlined, and the legend as [colour, underlined, words].
const VIEWS = {
  gap: {
    name: "Teacher gap",
    needs: "gap",
    colour: (it) => wash(it.gap > 0 ? ORANGE : BLUE, Math.abs(it.gap) / page.facts.clamp),
    marked: (it) => it.clamped,
    legend: (rollout) => [
      [wash(BLUE, 1), false, "the teacher finds the token likelier than the student"],
      [wash(ORANGE, 1), false, "the student finds it likelier"],
      ...(rollout.clamped
        ? [["", true, `beyond the clamp of ${page.facts.clamp} nats, where the gap is cut: full colour`]]
        : [["", false, `full colour at ${page.facts.clamp} nats`]]),
    ],
  },
  clip: {
    name: "Clip state",
    needs: "clipped",
    colour: (it) => (it.clipped ? wash(RED, 0.9) : wash(GREEN, 0.25)),
    marked: (it) => it.clamped,
    legend: (rollout) => [
      [wash(GREEN, 0.25), false, "has a gradient"],
      [wash(RED, 0.9), false, "clipped: the ratio has passed its bound in the direction of the advantage, no gradient"],
      ...(rollout.clamped ? [["", true, "the teacher gap is beyond its clamp"]] : []),
    ],
  },
  advantage: {
    name: "Advantage",
    needs: "advantage",
    colour: (it) => wash(it.advantage > 0 ? GREEN : RED, Math.abs(it.advantage) / 2),
    marked: () => false,
    legend: () => [
      [wash(GREEN, 1), false, "positive: made likelier"],
      [wash(RED, 1), false, "negative: made less likely; full colour at 2"],
      ["", false, page.facts.objective === "on_policy_kl" ? "log π teacher − log π student of each token" : "one value for a whole response"],
    ],
  },
  mismatch: {
    name: "Mismatch",
    needs: "mismatch",
    colour: (it) => wash(ORANGE, (Math.log10(Math.abs(it.mismatch) || 1e-9) + 6) / 6),
    marked: () => false,
    legend: () => [
      ["", false, "up to 1e-6 nats"], [wash(ORANGE, 0.5), false, "1e-3"], [wash(ORANGE, 1), false, "1 and more"],
      ["", false, "log π old − log π sampler: how far trainer and server disagree about the token"],
    ],
  },
};

let view = "gap";

/** Text, legend and buttons of a response; they follow the chosen view. */
function tokenView(rollout) {
  const box = element("div");
  if (!rollout.response_pieces) {
    box.append(element("pre", "", rollout.response), element("p", "soft", "An earlier version wrote no tokens."));
    return box;
  }
  const figures = rollout.response_pieces.map((_, i) => tokenFigures(rollout, i));
  const buttons = element("div", "views"), legend = element("ul", "legend"), note = element("p", "soft");
  const tokens = element("div", "tokens"), spans = rollout.response_pieces.map((piece, i) => tokenSpan(piece, i));
  tokens.append(...spans);
  buttons.append(element("span", "soft", "Colour"));
  for (const [name, { name: label }] of Object.entries(VIEWS)) {
    const button = element("button", "", label);
    button.type = "button";
    button.dataset.view = name;
    button.addEventListener("click", () => { view = name; paint(); });
    buttons.append(button);
  }
  const paint = () => {
    // The advantage alone is known of all responses; of one that was not trained on it moved nothing.
    const chosen = VIEWS[view], known = rollout.student_log_probs && figures.some((it) => it[chosen.needs] !== undefined);
    for (const button of buttons.querySelectorAll("button")) button.setAttribute("aria-pressed", button.dataset.view === view);
    spans.forEach((span, i) => {
      const shown = known && figures[i][chosen.needs] !== undefined;
      span.style.backgroundColor = shown ? chosen.colour(figures[i]) : "";
      span.classList.toggle("mark", Boolean(shown && chosen.marked(figures[i])));
    });
    legend.replaceChildren(...(known ? chosen.legend(rollout) : []).map(legendItem));
    note.textContent = known ? MEANING : unknownReason(rollout);
  };
  paint();
  tokens.addEventListener("mousemove", (event) => showTip(event, rollout, figures));
  tokens.addEventListener("mouseleave", hideTip);
  box.append(buttons, legend, tokens, note);
  return box;
}

const MEANING = "Figures are those of the update that trained on this response, before its optimizer step. Point at a token to see them.";

function unknownReason(rollout) {
  if (rollout.student_log_probs) return "The objective has no such figure.";
  return "Not trained on, so there is no such figure: all rewards of its group are equal, or it was filtered.";
}

function tokenSpan(piece, i) {
  // What would not be seen: control tokens, parts of a character, ends of lines.
  const shown = piece === "" ? "▯" : piece.replaceAll("\n", "↵\n");
  const span = element("span", piece.trim() ? "" : "unseen", shown);
  span.dataset.index = i;
  return span;
}

function legendItem([colour, underlined, words]) {
  const item = element("li");
  if (colour || underlined) {
    const patch = element("span", "patch", underlined ? "abc" : "\u00a0");
    patch.style.backgroundColor = colour;
    if (underlined) patch.style.textDecoration = "underline wavy 1px";
    item.append(patch);
  }
  item.append(words);
  return item;
}

function showTip(event, rollout, figures) {
  const index = event.target.dataset.index, tip = document.getElementById("tip");
  if (index === undefined) { hideTip(); return; }
  const i = Number(index), it = figures[i];
  const rows = [
    ["token", `${JSON.stringify(rollout.response_pieces[i])}, id ${rollout.response_tokens[i]}`],
    ["position", `${i + 1} of ${rollout.response_tokens.length}`],
    ["log π student", number(it.student)], ["log π old", number(it.old)],
    ["log π teacher", number(it.teacher)], ["log π sampler", number(it.sampler)],
    ["teacher gap", number(it.gap) + (it.clamped ? ", clamped" : "")],
    ["ratio", number(it.ratio) + (it.clipped ? ", clipped" : "")],
    ["advantage", number(it.advantage)], ["mismatch", number(it.mismatch)], ["entropy", number(it.entropy)],
  ].filter(([, value]) => value !== "–");
  const table = element("table");
  for (const cells of rows) {
    const row = element("tr");
    row.append(...cells.map((cell) => element("td", "", cell)));
    table.append(row);
  }
  tip.replaceChildren(table);
  tip.hidden = false;
  const { offsetWidth: width, offsetHeight: height } = tip;
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${event.clientY + 18 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 18}px`;
}

function hideTip() { document.getElementById("tip").hidden = true; }
