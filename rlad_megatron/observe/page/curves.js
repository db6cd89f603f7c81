"use strict";
// The curves. What is drawn where comes from observe/panels.py.

const COLOURS = ["#3b82d6", "#e0803a", "#2fa37c", "#b36ac2", "#d4556a", "#8d9440", "#4fb3c8", "#8a8f98"];
const MAX_POINTS = 500; // of a curve; longer ones are averaged
const SMOOTH_FROM = 30; // with this many points, a running mean is drawn over the raw curve

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

/** [label, key] of the metrics that a panel shows. */
function panelKeys(panel, metrics) {
  const found = new Map();
  for (const [pattern, label] of Object.entries(panel.series)) {
    const [start, end] = pattern.includes("*") ? pattern.split("*") : [pattern, null];
    for (const key of Object.keys(metrics)) {
      const matches = end === null ? key === start : key.startsWith(start) && key.endsWith(end);
      const rest = end === null ? "" : key.slice(start.length, key.length - end.length).replaceAll("_", " ");
      if (matches && !found.has(key) && metrics[key].some((value) => value !== null)) found.set(key, label + rest);
    }
  }
  return [...found].map(([key, label]) => [label, key]);
}

/** The finite points of a metric, or means of neighbours if there are too many. */
function points(metrics, key, missing = null) {
  const steps = [], values = [];
  metrics[key].forEach((value, i) => {
    if (value === null && missing === null) return;
    steps.push(metrics.step[i]);
    values.push(value ?? missing);
  });
  if (steps.length <= MAX_POINTS) return { x: steps, y: values };
  const x = [], y = [], width = steps.length / MAX_POINTS;
  for (let i = 0; i < MAX_POINTS; i++) {
    const [from, to] = [Math.round(i * width), Math.round((i + 1) * width)];
    x.push(Math.round(mean(steps.slice(from, to))));
    y.push(mean(values.slice(from, to)));
  }
  return { x, y };
}

function smoothed(values) {
  const half = Math.floor(Math.max(5, values.length / 20) / 2);
  return values.map((_, i) => mean(values.slice(Math.max(0, i - half), i + half + 1)));
}

function lineTraces(panel, metrics) {
  return panelKeys(panel, metrics).flatMap(([name, key], i) => {
    const { x, y } = points(metrics, key);
    const color = COLOURS[i % COLOURS.length];
    const trace = { x, y, name, mode: x.length <= 12 ? "lines+markers" : "lines", line: { color, width: 1.8 } };
    if (x.length < SMOOTH_FROM) return [trace];
    const raw = { ...trace, opacity: 0.3, showlegend: false, hoverinfo: "skip", line: { color, width: 1 } };
    return [raw, { ...trace, y: smoothed(y) }];
  });
}

/** The phases of each step, which add up to it; "other" on top. */
function phaseTraces(metrics) {
  if (!metrics["time/step"]) return [];
  const steps = metrics["time/step"].map((value, i) => (value === null ? -1 : i)).filter((i) => i >= 0);
  const whole = Object.fromEntries(Object.entries(metrics).map(([key, values]) => [key, steps.map((i) => values[i])]));
  const keys = Object.keys(whole).filter((key) => key.startsWith("time/") && !page.no_phases.includes(key));
  keys.sort((one, other) => (one === "time/other") - (other === "time/other"));
  return keys.map((key, i) => ({
    ...points(whole, key, 0),
    name: key.slice("time/".length).replaceAll("_", " "),
    stackgroup: "step",
    mode: "lines",
    line: { width: 0.5, color: key === "time/other" ? COLOURS.at(-1) : COLOURS[i % (COLOURS.length - 1)] },
  }));
}

function levelShape(panel, metrics) {
  const values = (metrics[panel.level] ?? []).filter((value) => value !== null);
  if (!values.length) return {};
  const y = values.at(-1);
  return {
    shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: COLOURS.at(-1), dash: "dash", width: 1.4 } }],
    annotations: [{ xref: "paper", x: 1, y, yanchor: "bottom", xanchor: "right", showarrow: false, text: "teacher" }],
  };
}

function layout(title, unit) {
  const style = getComputedStyle(document.documentElement);
  const [text, grid] = [style.getPropertyValue("--text"), style.getPropertyValue("--grid")];
  const axis = { gridcolor: grid, linecolor: grid, zeroline: false, automargin: true };
  return {
    margin: { l: 52, r: 8, t: 8, b: 36 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: text, size: 11 },
    hovermode: "x unified",
    hoverlabel: { bgcolor: style.getPropertyValue("--card"), font: { color: text } },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal" },
    xaxis: { ...axis, title: { text: title, standoff: 4 }, showgrid: false },
    yaxis: { ...axis, title: { text: unit, standoff: 6 }, rangemode: "normal" },
  };
}

/** Draw a figure in the grid, which is made when there is something to show. */
function drawFigure(id, order, heading, traces, shape) {
  let figure = document.getElementById(id);
  if (!traces.length) { // perhaps of a run that was resumed before it
    if (figure) {
      nearScreen.unobserve(figure);
      undrawn.delete(figure);
      inView.delete(figure);
      Plotly.purge(figure.querySelector(".plot"));
      figure.remove();
    }
    return;
  }
  if (!figure) {
    figure = element("figure", "card");
    figure.id = id;
    figure.style.order = order;
    figure.append(element("h3", "", heading), element("div", "plot"));
    document.getElementById("plots").append(figure);
    nearScreen.observe(figure);
  }
  shape.showlegend = traces.filter((trace) => trace.showlegend !== false).length > 1;
  undrawn.set(figure, { traces, shape });
  if (inView.has(figure)) drawNow(figure);
}

// Drawing takes longest, so it waits until a figure is near the screen.
const undrawn = new Map(), inView = new Set();
const nearScreen = new IntersectionObserver((entries) => entries.forEach(({ target, isIntersecting }) => {
  if (!isIntersecting) { inView.delete(target); return; }
  inView.add(target);
  drawNow(target);
}), { rootMargin: "400px" });
addEventListener("beforeprint", () => [...undrawn.keys()].forEach(drawNow));

function drawNow(figure) {
  const pending = undrawn.get(figure);
  if (!pending) return;
  undrawn.delete(figure);
  Plotly.react(figure.querySelector(".plot"), pending.traces, pending.shape, { displayModeBar: false, responsive: true });
}

function drawCurves(metrics, load) {
  page.panels.forEach((panel, i) => {
    const shape = { ...layout("step", panel.unit), ...levelShape(panel, metrics) };
    const traces = panel.stacked ? phaseTraces(metrics) : lineTraces(panel, metrics);
    const steps = traces.flatMap((trace) => trace.x);
    // Ticks at fractions of a step mean nothing.
    const [first, last] = [Math.min(...steps), Math.max(...steps)];
    if (last - first < 6) Object.assign(shape.xaxis, { dtick: 1, range: [first - 0.5, Math.max(last, first + 1) + 0.5] });
    if (panel.log && traces.some((trace) => trace.y.some((y) => y > 0))) {
      Object.assign(shape.yaxis, { type: "log", exponentformat: "power", dtick: 1 });
    } else if (panel.from_zero) {
      shape.yaxis.rangemode = "tozero";
    }
    drawFigure(`panel-${i}`, i, panel.title, traces, shape);
  });
  const end = Object.values(load).reduce((latest, { times }) => Math.max(latest, times.at(-1) ?? 0), 0);
  const traces = Object.entries(load).filter(([, curve]) => curve.times.length).map(([name, curve], i) => ({
    x: curve.times.map((time) => time - end), y: curve.values, name, mode: "lines",
    line: { shape: "hv", width: 1.4, color: COLOURS[i % COLOURS.length] },
  }));
  const shape = layout("seconds before the end of the newest step", "responses in flight");
  shape.yaxis.rangemode = "tozero";
  drawFigure("panel-load", page.panels.length, "Load of the servers", traces, shape);
}
