// Parts of a page that the server renders anew: every so many milliseconds while somebody looks, or once, when the page is there.

for (const part of document.querySelectorAll("[data-live]")) {
  const every = Number(part.dataset.every ?? 0);
  const renew = async () => {
    if (!document.hidden) {
      const answer = await fetch(part.dataset.live).catch(() => null);
      const text = answer ? await answer.text() : null;
      const busy = part.contains(document.activeElement) && document.activeElement !== part;
      if (text && answer.headers.get("content-type")?.startsWith("text/html") && text !== part.dataset.shown && !busy) {
        const page = new DOMParser().parseFromString(text, "text/html");
        part.replaceChildren(...(answer.ok ? page.body : page.querySelector("main")).childNodes);
        part.dataset.shown = text;
        part.removeAttribute("aria-busy");
      }
    }
    if (every) setTimeout(renew, every);
  };
  renew();
}
