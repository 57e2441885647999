// A form that is half filled in is filled in as it was after a reload, until it has been sent.
import { fill, forget, keep, kept } from "./_kept";

export function keepDrafts(): void {
  for (const form of document.querySelectorAll<HTMLFormElement>("form[data-draft]")) keepDraft(form);
}

function keepDraft(form: HTMLFormElement): void {
  const key = `draft ${location.pathname}${location.search}`;
  const given = JSON.parse(form.dataset["values"] ?? "{}") as Record<string, string>;
  fill(form, kept<Record<string, string>>(key) ?? given);
  form.addEventListener("input", () => keep(key, Object.fromEntries(new FormData(form))));
  form.addEventListener("htmx:afterRequest", (event) => {
    const { elt, xhr } = (event as CustomEvent<{ elt: Element; xhr: XMLHttpRequest }>).detail;
    if (elt === form && xhr.status === 200) forget(key);
  });
}
