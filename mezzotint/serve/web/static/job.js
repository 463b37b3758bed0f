import { asked, cancel, follow, run } from "./jobs.js";

const place = document.getElementById("job");
const job = await (await asked(`/v1/jobs/${place.dataset.id}`)).json();
const { box, update } = run(job);
box.querySelector("button").remove();
place.prepend(box);
document.getElementById("cancel")?.addEventListener("click", () => cancel(job.id).catch(() => {}));
await follow(job.id, update);
location.reload();
