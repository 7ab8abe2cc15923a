// The page as a whole: its tabs, drawing, and the keys.

import { $, ask, copy, draw } from "./api.js";
import { easel, prepareBrush } from "./brush.js";
import { about, habits, prepare, values, watchPrompt } from "./form.js";
import { figure, prepareGallery, refresh } from "./gallery.js";
import { prepareGrid } from "./grid.js";
import { prepareTraining } from "./train.js";

const PREVIEWS = 5;
let job = null;

function show(name) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const is = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", is);
    tab.tabIndex = is ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !is;
  }
  if (name === "gallery") refresh().catch(failed);
}

function prepareTabs() {
  const tabs = () => [...document.querySelectorAll("[role=tab]:not([hidden])")];
  for (const tab of tabs()) {
    tab.onclick = () => show(tab.getAttribute("aria-controls"));
    tab.onkeydown = (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      const next = tabs().at((tabs().indexOf(tab) + move) % tabs().length);
      next.focus();
      next.click();
    };
  }
}

const failed = (error) => { $("error").textContent = error.message; };

function busy(is) {
  $("go").disabled = is;
  $("cancel").hidden = $("progress").hidden = !is;
  $("progress").value = 0;
}

async function go() {
  if (job) return;
  $("error").textContent = "";
  busy(true);
  try {
    const fields = values();
    job = await draw({ ...fields, previews: PREVIEWS }, {
      step: (share) => { $("progress").value = share; },
      preview: (place, url) => preview(place, url),
      image: (place, told) => put(place, figure(told.url, `seed ${told.recipe.seed}`, told.recipe, job.command)),
      failed: (told) => { if (told.kind !== "cancelled") failed(told); },
    });
    $("empty").hidden = true;
    $("command").hidden = false;
    $("command").textContent = job.command;
    if (innerWidth <= 760) $("stage").scrollIntoView({ block: "start" });  // on a phone it lies below the form
    $("results").replaceChildren(...job.seeds.map((seed) => placeholder(seed)));
    await job.end;
    $("results").querySelectorAll("figure.waiting").forEach((each) => each.remove());
  } catch (error) {
    failed(error);
  }
  job = null;
  busy(false);
  know();
}

function placeholder(seed) {
  const made = document.createElement("figure");
  made.className = "waiting";
  const image = document.createElement("img");
  image.alt = "being drawn";
  image.src = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==";
  const caption = document.createElement("figcaption");
  caption.textContent = `seed ${seed} …`;
  made.append(image, caption);
  return made;
}

function preview(place, url) {
  const image = $("results").children[place]?.querySelector("img");
  if (image) { image.src = url; image.className = "preview"; image.dataset.previews = Number(image.dataset.previews ?? 0) + 1; }
}

function put(place, made) {
  made.dataset.previews = $("results").children[place]?.querySelector("img")?.dataset.previews ?? 0;
  $("results").children[place]?.replaceWith(made);
}

// What is only known once a worker has loaded the model.
async function know() {
  const found = await ask("api/about").catch((error) => ({ fault: error.message }));
  Object.assign(about, found);
  const size = found.models?.[$("model").value]?.size;
  $("status").textContent = found.fault || (found.ready ? `ready${size ? ` · ${size.join(" × ")}` : ""}` : "the model is being loaded …");
  $("status").className = found.ready ? "ready" : "";
  habits();
  if (!found.ready && !found.fault) setTimeout(know, 700);
}

function prepareKeys() {
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); ($("grid").hidden ? go : () => $("grid-form").requestSubmit())(); }
    if (event.key === "Escape" && job && !$("viewer").open) job.cancel().catch(failed);
  });
}

async function start() {
  await prepare(failed);
  await prepareTraining();
  prepareTabs();
  prepareBrush(failed);
  prepareGallery({ again: go, show });
  prepareGrid();
  prepareKeys();
  watchPrompt();
  $("form").addEventListener("submit", (event) => { event.preventDefault(); go(); });
  $("cancel").onclick = () => job?.cancel().catch(failed);
  $("dice").onclick = () => { $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0]; };
  $("copy-command").onclick = async () => { try { copy((await ask("api/command", values())).command); } catch (error) { failed(error); } };
  document.documentElement.dataset.ready = "true";  // the page can be used from here on
  know();
}

start().catch((error) => { $("status").textContent = error.message; });
