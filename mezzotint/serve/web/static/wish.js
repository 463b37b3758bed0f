// The form of a request: what the chosen model offers, and what the person wants of it.

import { element } from "./jobs.js";

const NUMBERS = ["steps", "guidance", "seed", "width", "height", "count", "strength"];
const models = JSON.parse(document.getElementById("models").textContent);
export const form = document.getElementById("wish");
export const button = form.querySelector("button.main");
const wrong = form.querySelector(".wrong");

export const chosen = () => models[form.elements.model.value];

export function say(message) {
  wrong.textContent = message ?? "";
  wrong.hidden = !message;
}

function options(select, rows) {
  select.replaceChildren(...rows.map(([value, text]) => element("option", { value }, text)));
}

// Whatever the model does by itself stands in the fields as a hint; what it cannot do is not shown.
function fit() {
  const model = chosen(), fields = form.elements;
  const able = { classes: model.classes.length > 0, text: model.text, negative: model.negative, guided: model.guided, adapters: model.adapters.length > 0 };
  for (const part of form.querySelectorAll("[data-for]")) part.hidden = !able[part.dataset.for];
  options(fields.label, [...(model.unlabelled && (model.text || !able.classes) ? [["", "nothing of it"]] : []), ...model.classes.map((name) => [name, name])]);
  if (fields.sampler) options(fields.sampler, [["", `${model.sampler} (the model's)`], ...model.samplers.filter((name) => name !== model.sampler).map((name) => [name, name])]);
  for (const [name, value] of [["steps", model.steps], ["guidance", model.guidance], ["width", model.size[0]], ["height", model.size[1]]])
    if (fields[name]) fields[name].placeholder = value;
  const adapters = form.querySelector(".adapters");
  adapters.replaceChildren(adapters.querySelector("legend"), ...model.adapters.map((name) =>
    element("label", { class: "choice" }, element("input", { type: "checkbox", name: "adapter", value: name }), name,
      element("input", { type: "number", step: "0.05", min: "-4", max: "4", value: "1", "aria-label": `weight of ${name}`, "data-weight": name }))));
  form.dispatchEvent(new CustomEvent("fitted"));
}

// The request as the routes take it, without what was left open.
export function wish() {
  const model = chosen(), fields = form.elements, found = { model: form.elements.model.value };
  if (model.classes.length && fields.label.value) found.label = fields.label.value;
  if (model.text && fields.prompt.value) found.prompt = fields.prompt.value;
  if (model.negative && fields.negative.value) found.negative = fields.negative.value;
  if (fields.sampler?.value) found.sampler = fields.sampler.value;
  for (const name of NUMBERS) {
    const field = fields[name];
    if (field && field.value !== "" && !field.closest("[hidden]")) found[name] = Number(field.value);
  }
  const adapters = [...form.querySelectorAll("input[name=adapter]:checked")];
  if (adapters.length) found.adapters = adapters.map((box) => ({ name: box.value, weight: Number(form.querySelector(`[data-weight="${CSS.escape(box.value)}"]`).value) }));
  return found;
}

// Calls `work` when the person asks; what goes wrong is said in the form.
export function whenAsked(work) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    say(null);
    button.setAttribute("aria-busy", "true");
    try {
      await work(wish());
    } catch (error) {
      say(error.message);
    } finally {
      button.removeAttribute("aria-busy");
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !button.disabled) form.requestSubmit();
  });
}

if (form.dataset.model && models[form.dataset.model]) form.elements.model.value = form.dataset.model;
form.elements.model.addEventListener("change", fit);
queueMicrotask(fit);
