import { create, follow, run } from "./jobs.js";
import { whenAsked } from "./wish.js";

const results = document.getElementById("results");

whenAsked(async (wish) => {
  const job = await create(wish);
  const { box, update } = run(job);
  results.querySelector(".empty")?.remove();
  results.prepend(box);
  follow(job.id, update);
});
