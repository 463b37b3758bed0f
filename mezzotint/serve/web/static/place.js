// A mask is painted on a picture, with a pointer or with keys; the server paints the defect under it.

import { create, follow, run } from "./jobs.js";
import { button, form, say, whenAsked } from "./wish.js";

const stage = document.getElementById("stage"), picture = document.getElementById("picture"), mask = document.getElementById("mask");
const results = document.getElementById("results"), size = document.getElementById("size"), erase = document.getElementById("erase"), share = document.getElementById("share");
const paint = document.createElement("canvas"), ink = paint.getContext("2d", { willReadFrequently: true }), seen = mask.getContext("2d");
const KEPT = 30, LONGEST = 1024, STEP = 0.02;
let source = null, past = [], cursor = null, last = null;

const radius = () => Math.max(1, (size.value / 100) * Math.max(paint.width, paint.height) * 0.25);

// What is seen: the paint in one colour, and the brush where the keys have it.
function draw() {
  seen.clearRect(0, 0, mask.width, mask.height);
  seen.drawImage(paint, 0, 0);
  seen.globalCompositeOperation = "source-in";
  seen.fillStyle = "rgb(255 70 60)";
  seen.fillRect(0, 0, mask.width, mask.height);
  seen.globalCompositeOperation = "source-over";
  if (cursor) {
    seen.lineWidth = Math.max(2, mask.width / 200);
    seen.strokeStyle = "#2f9bff";
    seen.beginPath();
    seen.arc(cursor.x, cursor.y, radius(), 0, 7);
    seen.stroke();
  }
}

function count() {
  const data = ink.getImageData(0, 0, paint.width, paint.height).data;
  let painted = 0;
  for (let i = 3; i < data.length; i += 4) painted += data[i] > 127;
  const part = painted / (paint.width * paint.height);
  share.textContent = source ? `${(100 * part).toFixed(1)} % of the picture` : "";
  button.disabled = !source || painted === 0;
}

function keep() {
  past.push(ink.getImageData(0, 0, paint.width, paint.height));
  if (past.length > KEPT) past.shift();
}

function undo() {
  const before = past.pop();
  if (before) ink.putImageData(before, 0, 0);
  draw();
  count();
}

function clear() {
  keep();
  ink.clearRect(0, 0, paint.width, paint.height);
  draw();
  count();
}

function stroke(from, to) {
  ink.globalCompositeOperation = erase.getAttribute("aria-pressed") === "true" ? "destination-out" : "source-over";
  ink.lineCap = ink.lineJoin = "round";
  ink.lineWidth = 2 * radius();
  ink.strokeStyle = "#fff";
  ink.beginPath();
  ink.moveTo(from.x, from.y);
  ink.lineTo(to.x + 0.01, to.y);
  ink.stroke();
  draw();
}

function at(event) {
  const box = mask.getBoundingClientRect();
  return { x: ((event.clientX - box.left) / box.width) * mask.width, y: ((event.clientY - box.top) / box.height) * mask.height };
}

mask.addEventListener("pointerdown", (event) => {
  if (!source) return;
  mask.setPointerCapture(event.pointerId);
  cursor = null;
  keep();
  last = at(event);
  stroke(last, last);
});
mask.addEventListener("pointermove", (event) => {
  if (!last) return;
  const now = at(event);
  stroke(last, now);
  last = now;
});
for (const end of ["pointerup", "pointercancel"]) mask.addEventListener(end, () => { if (last) count(); last = null; });

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
let down = false;
mask.addEventListener("focus", () => {
  if (source && !last && mask.matches(":focus-visible")) cursor ??= { x: mask.width / 2, y: mask.height / 2 };
  draw();
});
mask.addEventListener("blur", () => { cursor = null; down = false; draw(); });
mask.addEventListener("keydown", (event) => {
  if (!source) return;
  const move = MOVES[event.key];
  if (move || event.key === " ") {
    const before = cursor ?? { x: mask.width / 2, y: mask.height / 2 };
    const far = move ? STEP * Math.max(mask.width, mask.height) * (event.shiftKey ? 4 : 1) : 0;
    cursor = { x: Math.min(mask.width, Math.max(0, before.x + far * (move?.[0] ?? 0))), y: Math.min(mask.height, Math.max(0, before.y + far * (move?.[1] ?? 0))) };
    if (event.key === " " && !down) { keep(); down = true; }
    if (down) stroke(before, cursor);
  } else if (event.key === "+" || event.key === "-") {
    size.value = Number(size.value) + (event.key === "+" ? 4 : -4);
  } else if (event.key === "e") {
    erase.click();
  } else if (event.key === "z" && (event.ctrlKey || event.metaKey)) {
    undo();
  } else if (event.key === "Delete") {
    clear();
  } else {
    return;
  }
  event.preventDefault();
  draw();
});
mask.addEventListener("keyup", (event) => { if (event.key === " ") { down = false; count(); } });
size.addEventListener("input", draw);
erase.addEventListener("click", () => erase.setAttribute("aria-pressed", String(erase.getAttribute("aria-pressed") !== "true")));
document.getElementById("undo").addEventListener("click", undo);
document.getElementById("clear").addEventListener("click", clear);

// The picture as it is painted on: at its own size, or smaller where it is very large.
async function open(blob) {
  const bitmap = await createImageBitmap(blob).catch(() => { throw new Error("this is no picture that can be read: use PNG, JPEG or WebP"); });
  const scale = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
  for (const canvas of [picture, mask, paint]) {
    canvas.width = Math.round(bitmap.width * scale);
    canvas.height = Math.round(bitmap.height * scale);
  }
  picture.getContext("2d").drawImage(bitmap, 0, 0, picture.width, picture.height);
  source = blob;
  past = [];
  stage.querySelector(".empty").hidden = true;
  draw();
  count();
}

const tried = (blob) => open(blob).then(() => say(null), (error) => say(error.message));
form.elements.picture.addEventListener("change", () => form.elements.picture.files[0] && tried(form.elements.picture.files[0]));
for (const name of ["dragover", "dragleave", "drop"]) stage.addEventListener(name, (event) => {
  event.preventDefault();
  stage.classList.toggle("over", name === "dragover");
  if (name === "drop" && event.dataTransfer.files[0]) tried(event.dataTransfer.files[0]);
});
if (stage.dataset.source) fetch(stage.dataset.source).then((answer) => answer.blob()).then(tried);

function base64(blob) {
  return new Promise((resolve) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result.split(",")[1]));
    reader.readAsDataURL(blob);
  });
}

// White where the defect goes, black elsewhere.
function white() {
  const made = document.createElement("canvas");
  made.width = paint.width;
  made.height = paint.height;
  const context = made.getContext("2d");
  context.fillRect(0, 0, made.width, made.height);
  context.drawImage(paint, 0, 0);
  return new Promise((resolve) => made.toBlob(resolve, "image/png"));
}

whenAsked(async (wish) => {
  const job = await create({ ...wish, count: 1, image: await base64(source), mask: await base64(await white()) });
  const { box, update } = run(job);
  results.prepend(box);
  follow(job.id, update);
});
