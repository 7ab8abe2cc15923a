// Fine-tuning: looking through a data set, a run, its curves and its samples as they come.

import { $, ask, element, shown } from "./api.js";
import { about } from "./form.js";

const EVERY = 1500;  // milliseconds between looks at a run
let run = "", drawn = "";

export async function prepareTraining() {
  const state = await ask("api/train");
  if (!state.offered) return;
  $("tab-train").hidden = false;
  options($("train-data"), state.datasets);
  options($("train-model"), Object.keys(about.models));
  $("train-form").addEventListener("submit", (event) => { event.preventDefault(); act("start", fields()); });
  $("train-check").onclick = () => act("check", { data: $("train-data").value, model: $("train-model").value });
  $("train-stop").onclick = () => act("stop", {});
  $("train-runs").onchange = ({ target }) => { run = target.value; drawn = ""; look(); };
  $("train-method").onchange = () => { $("train-word-label").hidden = $("train-method").value !== "textual_inversion"; };
  if (state.running) look();
  tell(state);
}

function options(select, names) {
  select.replaceChildren(...names.map((name) => element("option", { value: name, textContent: name })));
}

function fields() {
  const found = { data: $("train-data").value, model: $("train-model").value, method: $("train-method").value, name: $("train-name").value };
  for (const name of ["max_steps", "batch_size", "lr", "rank", "every"]) if ($(`train-${name}`).value) found[name] = Number($(`train-${name}`).value);
  for (const name of ["word", "prompt"]) if ($(`train-${name}`).value) found[name] = $(`train-${name}`).value;
  return found;
}

async function act(what, body) {
  $("train-error").textContent = "";
  try {
    tell(await ask(`api/train/${what}`, body));
    if (what === "start") { run = body.name; drawn = ""; }
    look();
  } catch (error) {
    $("train-error").textContent = error.message;
  }
}

let looking;
async function look() {
  clearTimeout(looking);
  const state = await ask("api/train").catch((error) => { $("train-error").textContent = error.message; });
  if (!state) return;
  tell(state);
  if (run && state.runs.includes(run)) await show(run).catch(() => {});
  if (state.running) looking = setTimeout(look, EVERY);
}

function tell(state) {
  $("train-stop").hidden = !state.running;
  $("train-go").disabled = $("train-check").disabled = state.running;
  $("train-said").textContent = [state.command && `$ ${state.command}`, state.said].filter(Boolean).join("\n");
  $("train-said").hidden = !state.command;
  $("train-said").scrollTop = $("train-said").scrollHeight;
  $("train-state").textContent = state.running ? "running …" : state.command ? (state.code ? `ended with code ${state.code}` : "done") : "";
  if (String(state.runs) !== $("train-runs").dataset.names) {
    $("train-runs").dataset.names = state.runs;
    options($("train-runs"), ["", ...state.runs]);
  }
  $("train-runs").value = state.runs.includes(run) ? run : "";
}

async function show(name) {
  const told = await ask(`api/train/runs/${name}`);
  const state = `${told.log.length} ${Object.keys(told.samples)} ${told.result}`;
  if (state === drawn) return;
  drawn = state;
  const names = [...new Set(told.log.flatMap(Object.keys))].filter((key) => /loss/.test(key));
  const series = names.map((key) => ({ name: key, points: told.log.filter((entry) => key in entry).map((entry) => [entry.step, entry[key]]) }));
  $("train-curves").replaceChildren(...(series.length ? [chart(series)] : []));
  $("train-samples").replaceChildren(...Object.entries(told.samples).reverse().map(([step, url]) =>
    element("figure", {}, shown(url, `samples at ${step}`), element("figcaption", { textContent: `step ${Number(step.slice(5))}` }))));
  $("train-result").replaceChildren(...[
    told.result ? element("p", { textContent: `Prompts can name it now: <lora:${name}:1>` }) : null,
    told.report ? element("a", { href: `api/train/runs/${name}/report`, target: "_blank", textContent: "Report" }) : null].filter(Boolean));
}

const COLOURS = ["#5b5bd6", "#d6409f", "#2e9e5b", "#e5850b", "#0894b3", "#8a8a94"];

// Lines over the steps, with the range of both axes written beside them.
function chart(series) {
  const all = series.flatMap((each) => each.points), [width, height, left, bottom] = [640, 240, 60, 24];
  const [low, high] = [Math.min(...all.map(([, y]) => y)), Math.max(...all.map(([, y]) => y))];
  const [first, last] = [Math.min(...all.map(([x]) => x)), Math.max(...all.map(([x]) => x))];
  const at = ([x, y]) => [left + (x - first) / (last - first || 1) * (width - left - 10), 10 + (high - y) / (high - low || 1) * (height - bottom - 20)];
  const made = (name, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    Object.entries(attributes).forEach(([key, value]) => node.setAttribute(key, value));
    if (text) node.textContent = text;
    return node;
  };
  const svg = made("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", class: "chart" });
  svg.append(made("title", {}, series.map(({ name, points }) => `${name}: ${points.at(-1)[1]} at step ${points.at(-1)[0]}`).join("; ")),
    made("path", { d: `M${left} 10V${height - bottom - 10}H${width - 10}`, class: "axis" }),
    made("text", { x: left - 6, y: 16, "text-anchor": "end" }, high.toPrecision(3)), made("text", { x: left - 6, y: height - bottom - 10, "text-anchor": "end" }, low.toPrecision(3)),
    made("text", { x: left, y: height - 12 }, `step ${first}`), made("text", { x: width - 10, y: height - 12, "text-anchor": "end" }, last));
  series.forEach(({ name, points }, number) => {
    const colour = COLOURS[number % COLOURS.length];
    svg.append(made("polyline", { points: points.map((point) => at(point).join(",")).join(" "), stroke: colour, class: "line" }),
      made("text", { x: left + 10 + 150 * number, y: height - 12, dx: 60, fill: colour }, name));
  });
  return svg;
}
