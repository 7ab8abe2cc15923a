// ControlNets: the images that what is drawn has to follow, each on a card of its own.

import { $, dataUrl, element, loadImage } from "./api.js";

const MEANING = { "": "nothing, it is a hint already", canny: "its edges (canny)", scribble: "strokes of a pen (scribble)",
  tile: "the image without details (tile)" };
const FACTOR = 8;  // pixels by which proportions may differ, as the pipeline allows it
let about, size, failed, cards = [];

export const controls = {
  // size() tells {width, height} of what is drawn.
  prepare(known, tools) {
    about = known;
    ({ size, failed } = tools);
    $("follow").hidden = !Object.keys(about.controls).length;
    $("add-control").onclick = () => add().image.focus();
  },

  values() {
    const found = cards.filter((card) => card.url).map((card) => {
      const control = { model: card.model.value, image: cut(card) };
      if (card.kind.value) control.prepare = card.kind.value;
      if (card.mode.value) control.mode = card.mode.value;
      for (const name of ["scale", "start", "end"]) if (card[name].value !== "") control[name] = Number(card[name].value);
      return control;
    });
    if (!found.length) return {};
    return $("control_guess").checked ? { controls: found, control_guess: true } : { controls: found };
  },

  // Those of a recipe; fetched(name) gives the file of an image.
  async take(recorded, fetched) {
    [...cards].forEach(remove);
    $("control_guess").checked = recorded.some((one) => one.guess);
    for (const one of recorded) {
      const name = Object.keys(about.controls).find((each) => about.controls[each] === one.model.file);
      if (!name) throw new Error(`the ControlNet ${one.model.file} is not here`);
      const card = add();
      card.model.value = name;
      card.kind.value = one.prepare ?? "";
      card.mode.value = one.mode ?? "";
      for (const part of ["scale", "start", "end"]) card[part].value = one[part];
      await put(card, await fetched(one.image.file));
    }
  },
};

function add() {
  const number = (name, title, placeholder, max) => {
    card[name] = element("input", { type: "number", min: 0, step: 0.05, placeholder, ...(max ? { max } : {}) });
    return element("label", {}, title, card[name]);
  };
  const select = (choices) => element("select", {}, ...choices.map(([value, textContent]) => element("option", { value, textContent })));
  const card = { url: null, made: {} };
  card.image = element("input", { type: "file", accept: "image/*" });
  card.shown = element("img", { alt: "the image that is followed", hidden: true });
  card.model = select(Object.keys(about.controls).map((name) => [name, name]));
  card.kind = select(["", ...about.preparations].map((kind) => [kind, MEANING[kind] ?? kind]));
  card.mode = select(["", ...about.control_modes].map((mode) => [mode, mode || "it was trained on one kind"]));
  card.place = element("fieldset", { className: "control" }, element("legend", { textContent: "ControlNet" }),
    card.shown, element("label", {}, "Image ", card.image),
    element("label", {}, "ControlNet", card.model), element("label", {}, "Make of the image first", card.kind),
    element("label", {}, "Kind of hint, for a ControlNet of several", card.mode),
    element("div", { className: "fields" }, number("scale", "Strength", "1"), number("start", "From", "0", 1), number("end", "To", "1", 1)),
    element("button", { type: "button", textContent: "Remove", onclick: () => remove(card) }));
  card.image.addEventListener("change", ({ target }) => target.files[0] && put(card, target.files[0]).catch(failed));
  card.place.addEventListener("dragover", (event) => { event.preventDefault(); card.place.classList.add("over"); });
  card.place.addEventListener("dragleave", () => card.place.classList.remove("over"));
  card.place.addEventListener("drop", (event) => {
    event.preventDefault();
    event.stopPropagation();
    card.place.classList.remove("over");
    if (event.dataTransfer.files[0]) put(card, event.dataTransfer.files[0]).catch(failed);
  });
  cards.push(card);
  $("controls").append(card.place);
  $("follow").open = true;
  tell();
  return card;
}

function remove(card) {
  cards = cards.filter((each) => each !== card);
  card.place.remove();
  tell();
}

function tell() {
  $("add-control").disabled = cards.length >= about.limits.controls;
  cards.forEach((card, at) => { card.place.querySelector("legend").textContent = `ControlNet ${at + 1}`; });
}

async function put(card, file) {
  const url = await dataUrl(file);
  card.source = await loadImage(url);
  card.url = url;
  card.made = {};
  card.shown.src = url;
  card.shown.hidden = false;
}

// The image as it came, or cut at two sides to the proportions of what is drawn.
function cut(card) {
  const { width, height } = size(), { naturalWidth: w, naturalHeight: h } = card.source;
  if (!width || !height || Math.abs(h * width / w - height) <= FACTOR) return card.url;
  const key = `${width} ${height}`;
  if (!card.made[key]) {
    const [wide, high] = w * height > h * width ? [Math.round(h * width / height), h] : [w, Math.round(w * height / width)];
    const canvas = Object.assign(document.createElement("canvas"), { width: wide, height: high });
    canvas.getContext("2d").drawImage(card.source, Math.round((w - wide) / 2), Math.round((h - high) / 2), wide, high, 0, 0, wide, high);
    card.made = { [key]: canvas.toDataURL("image/png") };
  }
  return card.made[key];
}
