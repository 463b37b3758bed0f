// Jobs, as every page asks for them and follows them.

export async function asked(path, options = {}) {
  const answer = await fetch(path, options);
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  throw new Error(told?.error?.message ?? `the server answered ${answer.status}`);
}

export async function create(wish) {
  const body = JSON.stringify({ ...wish, previews: true });
  return (await asked("/v1/jobs", { method: "POST", headers: { "content-type": "application/json" }, body })).json();
}

export const cancel = (id) => asked(`/v1/jobs/${id}`, { method: "DELETE" });

// One stream for all jobs of a page: browsers open six to a server, and a comparison has more jobs than that.
const followed = new Map(), MOST = 100;
let stream = null, opening = false;

function reopen() {
  stream?.close();
  stream = null;
  if (!followed.size) return;
  stream = new EventSource(`/v1/jobs/events?${[...followed.keys()].slice(-MOST).map((id) => `ids=${id}`).join("&")}`);
  stream.addEventListener("progress", (event) => heard(JSON.parse(event.data)));
  stream.addEventListener("end", (event) => {
    const job = JSON.parse(event.data), one = followed.get(job.id);
    heard(job);
    followed.delete(job.id);
    if (!followed.size) reopen();
    one?.resolve(job);
  });
}

const heard = (job) => followed.get(job.id)?.seen(job);

// Calls `seen` with the job whenever something happened to it; the promise ends with the job.
export function follow(id, seen) {
  return new Promise((resolve) => {
    followed.set(id, { seen, resolve });
    if (opening) return;
    opening = true;
    setTimeout(() => { opening = false; reopen(); }, 50);
  });
}

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

export const spoken = (request) => [request.label, request.prompt].filter((part) => part !== null && part !== "").join(", ") || "no words";

const SAYS = { queued: "waiting", refused: "refused by the policy", cancelled: "cancelled", failed: "failed", expired: "too late" };

// What a place for pictures shows of a job: a preview that grows, then the pictures, or why there are none.
export function show(place, job) {
  if (job.pictures.length) {
    place.replaceChildren(...job.pictures.map((each, i) => element("a", { class: "thumb", href: `/pictures/${job.id}/${i}` },
      element("img", { src: each.url, alt: `${spoken(job.request)}, seed ${each.seed}` }))));
  } else if (job.state === "running" || job.state === "queued") {
    if (!place.querySelector(".growing")) place.replaceChildren(element("div", { class: "growing" }));
    const box = place.querySelector(".growing");
    if (job.previewed && box.dataset.step !== String(job.previewed)) {
      box.dataset.step = job.previewed;
      const next = element("img", { alt: "" });
      next.addEventListener("load", () => box.replaceChildren(next));
      next.src = `/v1/jobs/${job.id}/preview?step=${job.previewed}`;
    }
  } else {
    place.replaceChildren(element("p", { class: job.state === "cancelled" ? "soft" : "wrong" }, job.error ?? SAYS[job.state] ?? job.state));
  }
}

// A run: what was asked, how far it is, its pictures, a way to stop it.
export function run(job) {
  const bar = element("progress", { max: job.steps || 1, value: 0, "aria-label": "steps" });
  const says = element("span", { class: "soft small" }, "waiting");
  const stop = element("button", { type: "button", onclick: () => cancel(job.id).catch(() => {}) }, "Cancel");
  const place = element("div", { class: "pictures" });
  const box = element("article", { class: "run" },
    element("header", {}, element("a", { class: "what", href: `/jobs/${job.id}` }, spoken(job.request)), bar, says, stop), place);
  const update = (now) => {
    bar.max = now.steps || 1;
    bar.value = now.step;
    const ended = !["queued", "running"].includes(now.state);
    says.textContent = now.state === "running" ? `${now.step} of ${now.steps}` : ended ? "" : SAYS[now.state] ?? now.state;
    if (ended) [bar, stop].forEach((part) => part.remove());
    show(place, now);
  };
  update(job);
  return { box, update };
}
