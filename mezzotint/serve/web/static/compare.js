import { create, element, follow, show } from "./jobs.js";
import { chosen, form, whenAsked } from "./wish.js";

const results = document.getElementById("results"), samplers = document.getElementById("samplers"), many = document.getElementById("many");
const USUAL = ["ddim", "dpmpp_2m_karras", "flow_euler", "dpmpp_2m"];

const wanted = () => [...samplers.querySelectorAll("input:checked")].map((box) => box.value);
const counts = () => [...new Set(form.elements.counts.value.split(/[\s,;]+/).filter(Boolean).map(Number))];

function tell() {
  const pictures = wanted().length * counts().length;
  many.textContent = `${pictures} picture${pictures === 1 ? "" : "s"}`;
}

form.addEventListener("fitted", () => {
  const model = chosen();
  samplers.replaceChildren(samplers.querySelector("legend"), ...model.samplers.map((name) => element("label", { class: "choice" },
    element("input", { type: "checkbox", value: name, checked: name === model.sampler || USUAL.includes(name) }), name)));
  tell();
});
form.addEventListener("input", tell);

whenAsked(async (wish) => {
  const columns = wanted(), rows = counts();
  if (!columns.length) throw new Error("choose a sampler");
  if (!rows.length || rows.some((steps) => !Number.isInteger(steps) || steps < 1 || steps > 200)) throw new Error("steps are whole numbers from 1 to 200, such as 5, 10, 20");
  const seed = wish.seed ?? Math.floor(Math.random() * 2 ** 31);
  const head = element("tr", {}, element("th", { scope: "col" }, "steps"), ...columns.map((name) => element("th", { scope: "col" }, name)));
  const body = element("tbody");
  const table = element("table", { class: "compare" }, element("caption", { class: "soft small" }, `seed ${seed}`), element("thead", {}, head), body);
  results.replaceChildren(element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Comparison" }, table));
  for (const steps of rows) {
    const row = element("tr", {}, element("th", { scope: "row" }, steps));
    body.append(row);
    for (const sampler of columns) {
      const cell = element("td");
      row.append(cell);
      cell.append(element("div", { class: "growing" }));
      // one after the other into the queue, all at once on their way
      const job = await create({ ...wish, sampler, steps, seed, count: 1 }).catch((error) => cell.replaceChildren(element("p", { class: "wrong small says" }, error.message)));
      if (job) follow(job.id, (now) => show(cell, now));
    }
  }
});
