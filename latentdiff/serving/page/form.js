// The form: what can be chosen, what was chosen, and what the prompt means while one types.

import { $, ask, element } from "./api.js";
import { easel } from "./brush.js";
import { controls } from "./controls.js";

const NUMBERS = ["width", "height", "steps", "guidance_scale", "num_images", "seed"];
const TEXTS = ["prompt", "negative_prompt", "model", "sampler"];
export const SHOWN_APART = ["steps", "guidance_scale", "sampler"];
const LISTS = ["Numbers", "Interval", "Pair"];
export let about;

export async function prepare(failed) {
  about = await ask("api/about");
  controls.prepare(about, { size, failed });
  fill($("model"), Object.keys(about.models));
  fill($("sampler"), ["", ...about.options.sampler.choices]);
  for (const [name, option] of Object.entries(about.options)) {
    if (!SHOWN_APART.includes(name)) fieldsUnder(option.heading).append(field(name, option));
  }
  $("width").max = $("height").max = about.limits.side;
  $("steps").max = about.limits.steps;
  $("num_images").max = about.limits.images;
  chips("loras", "LoRA", about.loras, (name) => `<lora:${name}:1>`);
  chips("words", "Words", about.embeddings, (name) => name);
  habits();
  $("model").addEventListener("change", habits);
  return about;
}

function fill(select, names) {
  select.replaceChildren(...names.map((name) => element("option", { value: name, textContent: name || "the model's" })));
}

// The fields of a heading, which folds away; headings stand in the order in which they come.
function fieldsUnder(heading) {
  let group = [...$("more").children].find((group) => group.dataset.heading === heading);
  if (!group) {
    group = element("details", {}, element("summary", { textContent: heading }), element("div", { className: "fields" }));
    group.dataset.heading = heading;
    $("more").append(group);
  }
  return group.lastElementChild;
}

function field(name, option) {
  const label = element("label", { title: option.text }, name.replaceAll("_", " "));
  const common = { id: name, name, title: option.text };
  let input;
  if (option.choices) {
    input = element("select", common);
    fill(input, ["", ...option.choices]);
    input.options[0].textContent = option.default ?? "default";
  } else if (option.kind === "YesNo") {
    input = element("input", { ...common, type: "checkbox" });
    label.className = "check";
    label.prepend(input);
    return label;
  } else {
    const isList = LISTS.includes(option.kind);
    input = element("input", { ...common, type: isList ? "text" : "number", placeholder: option.default ?? "" });
    if (!isList) { input.step = option.kind === "Whole" ? 1 : "any"; input.min = option.low ?? ""; input.max = option.high ?? ""; }
  }
  label.append(input);
  return label;
}

// What the chosen model is drawn with where nothing else is said; known once a worker has loaded it.
export function habits() {
  const known = about.models[$("model").value];
  $("steps").placeholder = known?.steps ?? about.options.steps.default;
  $("guidance_scale").placeholder = known?.guidance ?? about.options.guidance_scale.default;
  $("width").placeholder = known?.size[0] ?? "its own";
  $("height").placeholder = known?.size[1] ?? "its own";
  $("sampler").options[0].textContent = known ? `${known.sampler} (the model's)` : "the model's";
}

function chips(id, title, names, text) {
  $(id).hidden = !names.length;
  $(id).replaceChildren(element("span", { className: "note", textContent: title }), ...names.map((name) => {
    const chip = element("button", { type: "button", className: "chip", textContent: name, title: `Put ${text(name)} into the prompt` });
    chip.onclick = () => {
      $("prompt").value = `${$("prompt").value.trimEnd()} ${text(name)}`.trim();
      $("prompt").dispatchEvent(new Event("input", { bubbles: true }));
    };
    return chip;
  }));
}

// The fields as the server takes them; what is empty is left open.
export function values() {
  const found = {};
  for (const name of TEXTS) if ($(name).value) found[name] = $(name).value;
  for (const name of NUMBERS) if ($(name).value !== "") found[name] = Number($(name).value);
  if ($("seed").value) found.seed = $("seed").value;  // may be longer than a number of JavaScript
  for (const [name, option] of Object.entries(about.options)) {
    const input = $(name);
    if (SHOWN_APART.includes(name) || !input) continue;
    if (option.kind === "YesNo") { if (input.checked) found[name] = true; }
    else if (input.value !== "") {
      const isList = LISTS.includes(option.kind);
      found[name] = isList ? input.value.split(/[\s,]+/).map(Number) : option.choices ? input.value : Number(input.value);
    }
  }
  return { prompt: "", ...found, ...easel.values(), ...controls.values() };
}

// Width and height of what is drawn, as far as they are known.
export function size() {
  const own = easel.size, side = (name) => Number($(name).value || $(name).placeholder) || 0;
  if (!own) return { width: side("width"), height: side("height") };
  const [width, height] = [Number($("width").value), Number($("height").value)];
  if (easel.values().mask || !(width || height)) return own;
  return { width: width || own.width * height / own.height, height: height || own.height * width / own.width };
}

// Put a recipe into the form: its options, and what it was made from.
export async function take(recipe) {
  const options = recipe.options ?? recipe;
  for (const input of $("form").querySelectorAll("#more input, #more select")) {
    if (input.type === "checkbox") input.checked = false;
    else input.value = "";
  }
  if (about.models[recipe.model] !== undefined) $("model").value = recipe.model;
  for (const [name, value] of Object.entries({ num_images: 1, negative_prompt: "", ...options })) {
    const input = $(name), option = about.options[name];
    if (!input || value === null || !(option || NUMBERS.includes(name) || TEXTS.includes(name))) continue;
    if (input.type === "checkbox") input.checked = value;
    else if (option && String(value) === String(option.default) && !SHOWN_APART.includes(name)) input.value = "";
    else input.value = Array.isArray(value) ? value.join(", ") : value;
  }
  await takeSources(recipe);
  $("prompt").dispatchEvent(new Event("input", { bubbles: true }));
}

const TASK = ["strength", "blur", "only_masked", "remove"];

async function takeSources({ sources = {}, task_settings: settings = {}, ...steering }) {
  easel.drop();
  await controls.take({}, fetched);
  if (sources.image) await easel.take(await fetched(sources.image.file));
  if (sources.mask) await easel.paint(await fetched(sources.mask.file));
  if (sources.image) [$("width").value, $("height").value] = [settings.width ?? "", settings.height ?? ""];
  for (const name of TASK) {
    if ($(name).type === "checkbox") $(name).checked = settings[name] ?? false;
    else $(name).value = settings[name] ?? $(name).defaultValue;
  }
  await controls.take(steering, fetched);
}

// What an image of this server was made from.
async function fetched(name) {
  const answer = name ? await fetch(`api/inputs/${encodeURIComponent(name)}`) : { ok: false };
  if (!answer.ok) throw new Error(`what it was made from is not here${name ? `: ${name}` : ""}; choose that image yourself`);
  return answer.blob();
}

let waiting, latest = 0;
export function watchPrompt() {
  $("form").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(explain, 250); });
}

async function explain() {
  const number = ++latest;
  const { image, mask, seed, num_images, strength, grow, blur, only_masked, remove, controls: followed, control_guess, image_prompts, ...fields } = values();
  if (!fields.prompt && !fields.negative_prompt) return tell({});
  try {
    const found = await ask("api/explain", fields);
    if (number === latest) tell(found);
  } catch (error) {
    if (number === latest) { tell({}); $("remarks").textContent = error.message; }
  }
}

function tell({ prompt, negative_prompt: negative, remarks }) {
  const said = prompt && !prompt.error ? [`${prompt.tokens} tokens`, `${prompt.room} fit into a chunk`] : [];
  if (prompt?.chunks?.length > 1) said.push(`${prompt.chunks.length} chunks`);
  if (negative?.tokens) said.push(`negative: ${negative.tokens}`);
  $("account").textContent = said.join(" · ");
  const warnings = [...(remarks ?? [])];
  for (const one of [prompt, negative]) {
    if (one?.error) warnings.push(one.error);
    if (one?.unheeded?.length) warnings.push(`has no meaning here: ${one.unheeded.join(" ")}`);
    if (one?.cut) warnings.push(`is not read: ${one.cut}`);
  }
  $("remarks").textContent = warnings.join(". ");
  $("tokens").replaceChildren(...(prompt?.chunks ?? []).flatMap((chunk) => chunk.map((run) =>
    element("span", { textContent: run.weight === 1 ? run.text : `${run.text} × ${Number(run.weight.toFixed(3))}`,
      title: `${run.count} tokens of weight ${run.weight}` }))));
}
