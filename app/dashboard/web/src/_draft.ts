// A form that is half filled in is filled in as it was after a reload, until it has been sent.
import { forget, keep, kept } from "./_kept";

export function keepDrafts(): void {
  for (const form of document.querySelectorAll<HTMLFormElement>("form[data-draft]")) keepDraft(form);
}

function keepDraft(form: HTMLFormElement): void {
  const key = `draft ${location.pathname}${location.search}`;
  const given = JSON.parse(form.dataset["values"] ?? "{}") as Record<string, string>;
  for (const [name, value] of Object.entries(kept<Record<string, string>>(key) ?? given)) {
    const field = form.elements.namedItem(name);
    if (field && "value" in field) field.value = value; // of a group of radio buttons it chooses the one
  }
  form.addEventListener("input", () => keep(key, Object.fromEntries(new FormData(form))));
  form.addEventListener("htmx:afterRequest", (event) => {
    const { elt, xhr } = (event as CustomEvent<{ elt: Element; xhr: XMLHttpRequest }>).detail;
    if (elt === form && xhr.status === 200) forget(key);
  });
}
