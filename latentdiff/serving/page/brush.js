// The image to begin from, and the brush that says what of it is to be changed.

import { $, dataUrl, loadImage } from "./api.js";

let url = null, painted = false, last = null;
const cursor = { x: 0.5, y: 0.5 };  // of the keyboard, in shares of the image

export const easel = {
  values() {
    if (!url) return {};
    const found = { image: url };
    if ($("strength").value !== "") found.strength = Number($("strength").value);
    if (!painted) return found;
    found.mask = mask();
    if (Number($("blur").value)) found.blur = Number($("blur").value);
    if ($("only_masked").checked) found.only_masked = true;
    if ($("remove").checked) found.remove = true;
    return found;
  },

  // Of the image, {width, height}; null without one.
  get size() { return url ? { width: $("edited").width, height: $("edited").height } : null; },

  // White parts of a mask, painted.
  async paint(source) {
    const image = await loadImage(await dataUrl(source)), { width, height } = $("brush"), context = $("brush").getContext("2d");
    context.drawImage(image, 0, 0, width, height);
    const pixels = context.getImageData(0, 0, width, height);
    for (let at = 0; at < pixels.data.length; at += 4) pixels.data.set([255, 45, 155, pixels.data[at] > 127 ? 255 : 0], at);
    context.putImageData(pixels, 0, 0);
    painted = true;
  },

  async take(source) {
    url = typeof source === "string" ? source : await dataUrl(source);
    const image = await loadImage(url);
    for (const id of ["edited", "brush"]) { $(id).width = image.naturalWidth; $(id).height = image.naturalHeight; }
    $("edited").getContext("2d").drawImage(image, 0, 0);
    $("brush-size").max = Math.max(20, Math.round(Math.max(image.naturalWidth, image.naturalHeight) / 2));
    $("brush-size").value = Math.max(4, Math.round(Math.max(image.naturalWidth, image.naturalHeight) / 8));
    painted = false;
    $("paint").hidden = false;
    $("source").open = true;
  },

  drop() {
    url = null;
    painted = false;
    $("paint").hidden = true;
    $("image-file").value = "";
  },
};

// White where the brush was, black elsewhere, as latentdiff inpaint takes it.
function mask() {
  const { width, height } = $("brush");
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  const pixels = $("brush").getContext("2d").getImageData(0, 0, width, height);
  for (let at = 0; at < pixels.data.length; at += 4) {
    const value = pixels.data[at + 3] > 127 ? 255 : 0;
    pixels.data.set([value, value, value, 255], at);
  }
  context.putImageData(pixels, 0, 0);
  return canvas.toDataURL("image/png");
}

function stroke(x, y) {
  const canvas = $("brush"), context = canvas.getContext("2d");
  context.strokeStyle = context.fillStyle = "#ff2d9b";
  context.lineWidth = Number($("brush-size").value);
  context.lineCap = "round";
  context.beginPath();
  context.moveTo(last?.x ?? x, last?.y ?? y);
  context.lineTo(x + 0.01, y);
  context.stroke();
  last = { x, y };
  painted = true;
}

function place(event) {
  const box = $("brush").getBoundingClientRect();
  return [(event.clientX - box.left) / box.width * $("brush").width, (event.clientY - box.top) / box.height * $("brush").height];
}

export function prepareBrush(failed) {
  const canvas = $("brush"), context = () => canvas.getContext("2d");
  canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); last = null; stroke(...place(event)); });
  canvas.addEventListener("pointermove", (event) => { if (event.buttons) stroke(...place(event)); });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-0.05, 0], ArrowRight: [0.05, 0], ArrowUp: [0, -0.05], ArrowDown: [0, 0.05] }[event.key];
    if (!move && event.key !== " ") return;
    event.preventDefault();
    if (move) { cursor.x = Math.min(1, Math.max(0, cursor.x + move[0])); cursor.y = Math.min(1, Math.max(0, cursor.y + move[1])); }
    last = null;
    if (event.key === " " || event.shiftKey) stroke(cursor.x * canvas.width, cursor.y * canvas.height);
  });
  $("image-file").addEventListener("change", ({ target }) => target.files[0] && easel.take(target.files[0]).catch(failed));
  $("erase-mask").onclick = () => { context().clearRect(0, 0, canvas.width, canvas.height); painted = false; };
  $("invert-mask").onclick = () => {
    const pixels = context().getImageData(0, 0, canvas.width, canvas.height);
    for (let at = 0; at < pixels.data.length; at += 4) pixels.data.set([255, 45, 155, pixels.data[at + 3] > 127 ? 0 : 255], at);
    context().putImageData(pixels, 0, 0);
    painted = true;
  };
  $("drop-image").onclick = easel.drop;
}
