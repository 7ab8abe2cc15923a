// x/y/z grids: one image for each combination of values, in tables whose headers name them.

import { $, ask, copy, draw, element, loadImage, shown } from "./api.js";
import { about, values } from "./form.js";

const NAMES = ["x", "y", "z"], TITLES = { x: "Columns", y: "Rows", z: "Sheets" }, AT_ONCE = 4;
let cells = [], running = [], stopped = false;

export function prepareGrid() {
  const choices = ["", "prompt", "seed", "steps", "guidance_scale", "sampler", "width", "height", "strength",
    ...Object.keys(about.options).filter((name) => !["steps", "guidance_scale", "sampler"].includes(name))];
  const start = { x: ["steps", "5, 15, 25"], y: ["guidance_scale", "1, 5"], z: ["", ""] };
  document.querySelector(".axes").append(...NAMES.map((axis) => element("fieldset", {}, element("legend", { textContent: TITLES[axis] }),
    element("label", {}, "Setting", selected(element("select", { id: `${axis}-name` }, ...choices.map((name) =>
      element("option", { value: name, textContent: name.replaceAll("_", " ") || "none" }))), start[axis][0])),
    element("label", {}, "Values", element("input", { id: `${axis}-values`, value: start[axis][1] })))));
  $("grid-form").addEventListener("submit", (event) => { event.preventDefault(); run().catch(failed); });
  $("grid-cancel").onclick = () => { stopped = true; running.forEach((job) => job.cancel().catch(() => {})); };
  $("grid-copy").onclick = async () => { try { copy(await command()); } catch (error) { failed(error); } };
  $("grid-save").onclick = () => save().catch(failed);
}

function selected(select, value) {
  select.value = value;
  return select;
}

const failed = (error) => { $("grid-error").textContent = error.message; };

// [{name, values: [text]}] of the axes that are used.
function axes() {
  const found = NAMES.map((axis) => {
    const name = $(`${axis}-name`).value;
    const values = $(`${axis}-values`).value.split(name === "prompt" ? "|" : ",").map((text) => text.trim()).filter(Boolean);
    return { name, values };
  }).filter((axis) => axis.name);
  for (const axis of found) if (!axis.values.length) throw new Error(`expected values for ${axis.name}`);
  if (!found.length) throw new Error("expected a setting for one axis or more");
  if (new Set(found.map((axis) => axis.name)).size < found.length) throw new Error("expected each setting on one axis only");
  return found;
}

function with_(fields, axis, value) {
  if (axis.name !== "prompt") {
    const kind = about.options[axis.name]?.kind;
    return { ...fields, [axis.name]: kind === "YesNo" ? value === "true" : kind === "Choice" || axis.name === "seed" ? value : Number(value) };
  }
  if (!fields.prompt.includes(axis.values[0])) throw new Error(`the prompt does not hold ${axis.values[0]}`);
  return { ...fields, prompt: fields.prompt.replaceAll(axis.values[0], value) };
}

const label = (axis, value) => (axis.name === "prompt" ? value : `${axis.name.replaceAll("_", " ")} ${value}`);

async function run() {
  $("grid-error").textContent = "";
  const [x, y = { values: [""] }, z = { values: [""] }] = axes();
  const base = { ...values(), num_images: 1 };
  base.seed ??= Math.floor(Math.random() * 2 ** 32);  // the same for all
  stopped = false;
  cells = [];
  $("sheets").replaceChildren(...z.values.map((zValue) => element("table", {},
    element("caption", { textContent: z.name ? label(z, zValue) : "" }),
    element("tr", {}, element("td"), ...x.values.map((value) => element("th", { textContent: label(x, value), scope: "col" }))),
    ...y.values.map((yValue) => element("tr", {}, element("th", { textContent: y.name ? label(y, yValue) : "", scope: "row" }),
      ...x.values.map((xValue) => {
        const place = element("td", { textContent: "…" });
        let fields = with_(base, x, xValue);
        if (y.name) fields = with_(fields, y, yValue);
        if (z.name) fields = with_(fields, z, zValue);
        cells.push({ place, fields, text: [label(x, xValue), y.name && label(y, yValue), z.name && label(z, zValue)].filter(Boolean).join(", ") });
        return place;
      }))))));
  busy(true);
  const left = [...cells];
  let done = 0;
  const work = async () => {
    for (let cell = left.shift(); cell && !stopped; cell = left.shift()) {
      await one(cell);
      $("grid-progress").value = ++done / cells.length;
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));  // which the server makes in batches where they are alike
  busy(false);
  $("grid-save").hidden = !cells.every((cell) => cell.url);
}

async function one(cell) {
  const failedCell = (message) => { cell.place.textContent = message; cell.place.className = "error"; };
  try {
    const job = await draw(cell.fields, {
      image: (_, told) => { cell.url = told.url; cell.place.replaceChildren(shown(told.url, cell.text)); },
      failed: (told) => failedCell(told.message),
    });
    running.push(job);
    await job.end;
    running = running.filter((each) => each !== job);
  } catch (error) {
    failedCell(error.message);
  }
}

function busy(is) {
  $("grid-go").disabled = is;
  $("grid-cancel").hidden = $("grid-progress").hidden = !is;
  $("grid-progress").value = 0;
}

// The command of the form, as that of a grid.
async function command() {
  const found = axes();
  const { image, mask, num_images, ...fields } = values();
  if (image) throw new Error("latentdiff grid draws from prompts alone; the grid of an image is drawn here only");
  const said = (await ask("api/command", fields)).command.replace("latentdiff generate", "latentdiff grid");
  const quoted = (text) => (/^[\w.,=+-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
  const flags = found.map((axis, place) => `--${NAMES[place]} ${quoted(`${axis.name}=${axis.values.join(axis.name === "prompt" ? "|" : ",")}`)}`);
  return [said, ...flags].join(" ");
}

// All tables on one canvas, and that as a file.
async function save() {
  const images = await Promise.all(cells.map((cell) => loadImage(cell.url)));
  const [width, height] = [Math.max(...images.map((each) => each.naturalWidth)), Math.max(...images.map((each) => each.naturalHeight))];
  const tables = [...$("sheets").querySelectorAll("table")], left = 130, top = 24, gap = 6;
  const columns = tables[0].rows[0].cells.length - 1, rows = tables[0].rows.length - 1;
  const sheet = rows * (height + gap) + 2 * top;
  const canvas = Object.assign(document.createElement("canvas"), { width: left + columns * (width + gap), height: tables.length * sheet });
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = "#000";
  context.font = "12px system-ui, sans-serif";
  tables.forEach((table, number) => {
    const begin = number * sheet;
    context.fillText(table.caption.textContent, 4, begin + 15, canvas.width);
    [...table.rows[0].cells].slice(1).forEach((cell, at) => context.fillText(cell.textContent, left + at * (width + gap), begin + top + 15, width));
    [...table.rows].slice(1).forEach((line, y) => {
      context.fillText(line.cells[0].textContent, 4, begin + 2 * top + y * (height + gap) + height / 2, left - 8);
      for (let x = 0; x < columns; x++) context.drawImage(images[(number * rows + y) * columns + x], left + x * (width + gap), begin + 2 * top + y * (height + gap));
    });
  });
  const link = element("a", { href: canvas.toDataURL("image/png"), download: "grid.png" });
  link.click();
}
