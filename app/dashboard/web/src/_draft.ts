// A form that is half filled in is filled in as it was after a reload, until it has been sent.
import htmx from "htmx.org";
import { entriesOf, fill, forget, keep, kept, type Entries } from "./_kept";

export function keepDrafts(): void {
  for (const form of document.querySelectorAll<HTMLFormElement>("form[data-draft]")) keepDraft(form);
}

function keepDraft(form: HTMLFormElement): void {
  const key = `draft ${location.pathname}${location.search}`;
  const given = Object.entries(JSON.parse(form.dataset["values"] ?? "{}") as Record<string, string>);
  const before = kept<Entries>(key);
  if (before) for (const box of form.querySelectorAll<HTMLInputElement>("[type=checkbox]")) box.checked = false;
  let absent = fill(form, before ?? given); // fields that come later, as those of a file's rows do
  void bring(form, absent);

  let isSent = false;
  const remember = () => {
    if (!isSent) keep(key, [...entriesOf(form), ...absent]);
  };
  form.addEventListener("input", remember);
  form.addEventListener("change", remember);
  form.addEventListener("htmx:afterSettle", () => {
    absent = fill(form, absent);
    remember();
  });
  form.addEventListener("htmx:afterRequest", (event) => {
    const { elt, xhr } = (event as CustomEvent<{ elt: Element; xhr: XMLHttpRequest }>).detail;
    if (elt !== form || xhr.status !== 200) return;
    isSent = true; // a plan may still come
    forget(key);
  });
}

/** Parts of the form that were added one by one, each named by its field `….type`. */
async function bring(form: HTMLFormElement, absent: Entries): Promise<void> {
  const place = form.querySelector<HTMLElement>("[data-parts]");
  if (!place) return;
  for (const [name, kind] of absent) {
    if (!name.endsWith(".type")) continue;
    const query = new URLSearchParams({ kind, key: name.slice(0, -".type".length) });
    form.inert = true; // until it is whole nobody sends it
    await htmx.ajax("get", `${place.dataset["parts"]}?${query}`, { target: place, swap: "beforeend" }).catch(() => undefined);
  }
  form.inert = false;
}
