// What the server is asked, and small helpers for the page's elements.

export const $ = (id) => document.getElementById(id);

export function element(name, fields = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(fields)) {
    if (key in made && key !== "list") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export async function ask(path, body, options = {}) {
  const isFile = body instanceof Blob;
  const answer = await fetch(path, body === undefined ? options : {
    method: "POST",
    headers: isFile ? {} : { "Content-Type": "application/json" },
    body: isFile ? body : JSON.stringify(body),
    ...options,
  });
  const said = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(worded(said.detail) || `the server answers ${answer.status}`);
  return said;
}

function worded(detail) {
  if (!Array.isArray(detail)) return detail;
  return detail.map((each) => `${each.loc.at(-1)}: ${each.msg}`).join("; ");
}

// Begins a job and tells of it: on.step(share), on.preview(place, url), on.image(place, told), on.failed(told).
export async function draw(fields, on) {
  const begun = await ask("api/draw", fields);
  const events = new EventSource(`api/jobs/${begun.job}/events`);
  const shares = begun.seeds.map(() => 0);
  const share = () => on.step?.(shares.reduce((sum, each) => sum + each, 0) / shares.length);
  begun.end = new Promise((resolve) => {
    const stop = () => { events.close(); resolve(); };
    events.onmessage = ({ data }) => {
      const told = JSON.parse(data);
      if (told.type === "step") told.places.forEach((place) => { shares[place] = 0.98 * told.done / told.steps; });
      if (told.type === "preview") on.preview?.(told.place, told.url);
      if (told.type === "image") { shares[told.place] = 1; on.image?.(told.place, told); }
      if (told.type === "failed") { shares[told.place] = 1; on.failed?.(told); }
      share();
      if (told.type === "end") stop();
    };
    events.onerror = () => {
      if (events.readyState === EventSource.CLOSED) { on.failed?.({ message: "the server is gone" }); stop(); }
    };
  });
  begun.cancel = () => ask(`api/jobs/${begun.job}/cancel`, {});
  return begun;
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    toast("Copied");
  } catch {
    toast(text);
  }
}

let hiding;
export function toast(text) {
  $("toast").textContent = text;
  $("toast").classList.add("shown");
  clearTimeout(hiding);
  hiding = setTimeout(() => $("toast").classList.remove("shown"), 2500);
}

export const dataUrl = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(file);
});

export function loadImage(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("this is no image that the browser can show"));
    image.src = url;
  });
}

// Small images are enlarged without blur only where they are much smaller than their place.
export function shown(url, alt, fields = {}) {
  const image = element("img", { src: url, alt, ...fields });
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth * 3 < image.clientWidth));
  return image;
}
