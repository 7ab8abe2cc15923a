// Images that steer beside the prompt, each on a card of its own: those that ControlNets follow, and those to resemble.

import { $, dataUrl, element, loadImage } from "./api.js";

const MEANING = { "": "nothing, it is a hint already", canny: "its edges (canny)", scribble: "strokes of a pen (scribble)",
  tile: "the image without details (tile)" };
const FACTOR = 8;  // pixels by which proportions may differ, as the pipeline allows it
const NUMBERS = ["scale", "start", "end"];
// Of each option of the server: where its cards are; what is chosen on them, {name: [title, [[value, text], ...]]}, the first of
// it a network; whether images are cut to the proportions of what is drawn; and what recipes hold of the image.
const KINDS = {
  controls: { block: "follow", title: "ControlNet", alt: "the image that is followed", isCut: true, image: (one) => one.image,
    choices: () => ({ model: ["ControlNet", named(about.controls)],
      prepare: ["Make of the image first", ["", ...about.preparations].map((kind) => [kind, MEANING[kind] ?? kind])],
      mode: ["Kind of hint, for a ControlNet of several", ["", ...about.control_modes].map((mode) => [mode, mode || "it was trained on one kind"])] }),
    offered: () => about.controls },
  image_prompts: { block: "resemble", title: "Image prompt", alt: "the image to resemble", isCut: false, image: alone,
    choices: () => ({ adapter: ["IP-Adapter", named(about.ip_adapters)] }), offered: () => about.ip_adapters },
};
const named = (offered) => Object.keys(offered).map((name) => [name, name]);
let about, size, failed, cards = [];

export const controls = {
  // size() tells {width, height} of what is drawn.
  prepare(known, tools) {
    about = known;
    ({ size, failed } = tools);
    for (const [name, { block, offered }] of Object.entries(KINDS)) {
      $(block).hidden = !Object.keys(offered()).length;
      $(`add-${block}`).onclick = () => add(name).image.focus();
    }
  },

  values() {
    const found = {};
    for (const card of cards.filter((each) => each.url)) {
      const one = { image: KINDS[card.name].isCut ? cut(card) : card.url };
      for (const [name, { value }] of Object.entries(card.chosen)) if (value) one[name] = value;
      for (const name of NUMBERS) if (card[name].value !== "") one[name] = Number(card[name].value);
      (found[card.name] ??= []).push(one);
    }
    return found.controls && $("control_guess").checked ? { ...found, control_guess: true } : found;
  },

  // Those of a recipe, {controls: [...], image_prompts: [...]}; fetched(name) gives the file of an image.
  async take(recipe, fetched) {
    [...cards].forEach(remove);
    $("control_guess").checked = (recipe.controls ?? []).some((one) => one.guess);
    for (const [kind, { title, choices, offered, image }] of Object.entries(KINDS)) {
      const [network] = Object.keys(choices());
      for (const one of recipe[kind] ?? []) {
        const name = Object.keys(offered()).find((each) => offered()[each] === one[network].file);
        if (!name) throw new Error(`${title}: ${one[network].file} is not here`);
        const file = await fetched(image(one).file), card = add(kind);
        for (const [part, select] of Object.entries(card.chosen)) select.value = part === network ? name : one[part] ?? "";
        for (const part of NUMBERS) card[part].value = one[part];
        await put(card, file);
      }
    }
  },
};

// The image of a recorded image prompt, which holds nothing that has no place on a card.
function alone(one) {
  if (one.images.length > 1 || one.negative || one.blocks)
    throw new Error("image prompts of several images, negative ones and those for some blocks are not on this page; use latentdiff reproduce");
  return one.images[0];
}

function add(name) {
  const { block, title, alt, choices } = KINDS[name];
  const number = (part, text, placeholder, max) => {
    card[part] = element("input", { type: "number", min: 0, step: 0.05, placeholder, ...(max ? { max } : {}) });
    return element("label", {}, text, card[part]);
  };
  const select = (part, [text, values]) => {
    card.chosen[part] = element("select", {}, ...values.map(([value, textContent]) => element("option", { value, textContent })));
    return element("label", {}, text, card.chosen[part]);
  };
  const card = { name, url: null, made: {}, chosen: {} };
  card.image = element("input", { type: "file", accept: "image/*" });
  card.shown = element("img", { alt, hidden: true });
  card.place = element("fieldset", { className: "control" }, element("legend", { textContent: title }),
    card.shown, element("label", {}, "Image ", card.image),
    ...Object.entries(choices()).map(([part, told]) => select(part, told)),
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
  $(`${block}-cards`).append(card.place);
  $(block).open = true;
  tell();
  return card;
}

function remove(card) {
  cards = cards.filter((each) => each !== card);
  card.place.remove();
  tell();
}

function tell() {
  for (const [name, { block, title }] of Object.entries(KINDS)) {
    $(`add-${block}`).disabled = cards.length >= about.limits.controls;
    cards.filter((card) => card.name === name)
      .forEach((card, at) => { card.place.querySelector("legend").textContent = `${title} ${at + 1}`; });
  }
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
