// Images with their recipes: in results, in the gallery, side by side, and those that are dropped.

import { $, ask, copy, element, loadImage, shown } from "./api.js";
import { easel } from "./brush.js";
import { about, SHOWN_APART, take } from "./form.js";

let again, show, chosen = [];

export function prepareGallery(actions) {
  ({ again, show } = actions);
  $("refresh").onclick = refresh;
  $("compare").onclick = () => compare(...chosen);
  $("viewer").querySelector(".close").onclick = () => $("viewer").close();
  $("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
  $("read-file").addEventListener("change", ({ target }) => target.files[0] && read(target.files[0]));
  for (const [id, taken] of [["drop", read], ["source", (file) => easel.take(file).catch((error) => { $("error").textContent = error.message; })]]) {
    $(id).addEventListener("dragover", (event) => { event.preventDefault(); $(id).classList.add("over"); });
    $(id).addEventListener("dragleave", () => $(id).classList.remove("over"));
    $(id).addEventListener("drop", (event) => {
      event.preventDefault();
      event.stopPropagation();
      $(id).classList.remove("over");
      if (event.dataTransfer.files[0]) taken(event.dataTransfer.files[0]);
    });
  }
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {  // anywhere else on the page: read it
    event.preventDefault();
    if (event.dataTransfer?.files[0]) { show("read"); read(event.dataTransfer.files[0]); }
  });
}

// A figure with what can be done with its image; `recipe` is an object or a function that gives one.
export function figure(url, caption, recipe, command) {
  const known = async () => (typeof recipe === "function" ? recipe() : recipe);
  const button = (text, title, action) => element("button", { type: "button", textContent: text, title, onclick: () => action().catch(failed) });
  const made = element("figure", {}, shown(url, caption, { onclick: () => view(url, caption, known), loading: "lazy" }),
    element("figcaption", {},
      element("span", { className: "grow", textContent: caption, title: caption }),
      button("Again", "Make this image again", async () => { show("draw"); await take(await known()); again(); }),
      button("Settings", "Put its settings into the form", async () => { show("draw"); await take(await known()); }),
      button("Change", "Begin from this image", async () => { await easel.take(await urlOf(url)); show("draw"); }),
      command ? button("Command", "Copy the command line that makes it", () => copy(command)) : null,
      button("Choose", "Choose for a comparison", async () => choose(made, url, caption, known))));
  return made;
}

async function urlOf(url) {
  if (url.startsWith("data:")) return url;
  const image = await loadImage(url);
  const canvas = Object.assign(document.createElement("canvas"), { width: image.naturalWidth, height: image.naturalHeight });
  canvas.getContext("2d").drawImage(image, 0, 0);
  return canvas.toDataURL("image/png");
}

export async function refresh() {
  const names = await ask("api/images");
  chosen = [];
  tellChosen();
  $("gallery-images").replaceChildren(...names.map((name) => figure(`api/images/${name}`, name, () => ask(`api/images/${name}/recipe`))));
  if (!names.length) $("gallery-images").append(element("p", { className: "note", textContent: "Nothing has been drawn yet." }));
}

function choose(made, url, caption, known) {
  const at = chosen.findIndex((one) => one.made === made);
  if (at >= 0) chosen.splice(at, 1);
  else chosen.push({ made, url, caption, known });
  if (chosen.length > 2) chosen.shift().made.classList.remove("chosen");
  document.querySelectorAll("figure").forEach((one) => one.classList.toggle("chosen", chosen.some((each) => each.made === one)));
  tellChosen();
  if (chosen.length === 2 && at < 0) compare(...chosen);
}

function tellChosen() {
  $("compare").disabled = chosen.length !== 2;
  $("chosen").textContent = chosen.length ? `${chosen.length} chosen` : "";
}

function open(...children) {
  $("viewed").replaceChildren(...children);
  $("viewer").showModal();
}

async function view(url, caption, known) {
  const recipe = await known().catch((error) => ({ recipe: error.message }));
  const options = Object.entries(recipe.options ?? recipe);
  const told = options.filter(([name, value]) => SHOWN_APART.includes(name) || String(value) !== String(about.options[name]?.default));
  open(shown(url, caption), table(flat(Object.fromEntries(told))));
}

// Both in one place, with a handle between them, and what differs in their recipes.
async function compare(first, second) {
  const [one, other] = await Promise.all([first, second].map((each) => each.known().then(flat).catch(() => ({}))));
  const top = element("img", { src: second.url, alt: second.caption });
  const slider = element("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": "Where the second image begins" });
  const cut = () => { top.style.clipPath = `inset(0 0 0 ${slider.value}%)`; };
  slider.oninput = cut;
  cut();
  const names = [...new Set([...Object.keys(one), ...Object.keys(other)])].filter((name) => one[name] !== other[name]);
  open(element("div", { className: "two" }, element("img", { src: first.url, alt: first.caption }), top), slider,
    element("table", { id: "differences" }, element("caption", { textContent: names.length ? "What differs" : "The recipes are equal" }),
      ...names.map((name) => row(name, one[name] ?? "", other[name] ?? ""))));
}

const row = (name, ...values) => element("tr", {}, element("th", { textContent: name, scope: "row" }),
  ...values.map((value) => element("td", { textContent: value })));
const table = (fields) => element("table", {}, ...Object.entries(fields).map(([name, value]) => row(name, value)));

function flat(recipe) {
  const options = recipe.options ?? recipe;
  return Object.fromEntries(Object.entries(options).filter(([, value]) => value !== null && value !== "" && String(value))
    .map(([name, value]) => [name, typeof value === "object" ? JSON.stringify(value) : String(value)]));
}

export async function read(file) {
  const place = $("account-of-image");
  try {
    const found = await ask("api/recipe", file);
    const url = URL.createObjectURL(file);
    const use = element("button", { type: "button", className: "primary", textContent: "Use these settings", onclick: () => { show("draw"); take(found).catch(failed); } });
    const rows = found.fields.map((one) => element("tr", {}, element("th", { textContent: one.name, scope: "row" }),
      element("td", { textContent: one.value }), element("td", { className: one.verdict, textContent: one.verdict }), element("td", { textContent: one.why })));
    place.replaceChildren(element("div", { className: "row" }, shown(url, file.name, { width: 160 }),
      element("div", {}, element("p", { textContent: `Made with ${found.program || "an unknown program"}, ${found.size.join(" × ")} pixels` }),
        found.lacking.length ? element("p", { className: "error", textContent: found.lacking.join("; ") }) : use)),
      element("table", { id: "fields-of-image" }, ...rows));
  } catch (error) {
    place.replaceChildren(element("p", { className: "error", role: "alert", textContent: error.message }));
  }
}

function failed(error) {
  $("error").textContent = error.message;
  show("draw");
}
