// On every page: partial updates, times, theme, menu.
import htmx from "htmx.org";
import { Idiomorph } from "idiomorph";
import { csrfToken } from "./_api";
import { keepDrafts } from "./_draft";
import { keepForGood } from "./_kept";
import { tellTimes } from "./_time";
import { toast } from "./_toast";

Object.assign(htmx.config, {
  allowEval: false,
  includeIndicatorStyles: false,
  selfRequestsOnly: true,
  historyCacheSize: 0,
  scrollIntoViewOnBoost: false,
  defaultSwapStyle: "outerHTML",
});

// what is refreshed changes only where it differs: nothing flickers, and the focus stays
htmx.defineExtension("morph", {
  isInlineSwap: (style) => style === "morph",
  handleSwap: (style, node, fragment) => {
    if (style !== "morph") return false;
    const content = fragment as DocumentFragment;
    return Idiomorph.morph(node as Element, [...content.childNodes] as Element[], { morphStyle: "outerHTML" }) as unknown as Node[];
  },
});

document.body.addEventListener("htmx:configRequest", (event) => {
  const { detail } = event as CustomEvent<{ headers: Record<string, string> }>;
  detail.headers["X-CSRF-Token"] = csrfToken();
});
// a page that nobody looks at asks for nothing by itself
document.body.addEventListener("htmx:beforeRequest", (event) => {
  const { elt } = (event as CustomEvent<{ elt: Element }>).detail;
  if (document.hidden && elt.hasAttribute("data-refreshes")) event.preventDefault();
});

interface Failed {
  xhr: XMLHttpRequest;
  elt: Element;
  target: Element;
}

document.body.addEventListener("htmx:responseError", (event) => {
  const { xhr, target } = (event as CustomEvent<Failed>).detail;
  tell(xhr.getResponseHeader("X-Problem") ?? `the server answered ${xhr.status}; try again`, target);
});
document.body.addEventListener("htmx:sendError", (event) => {
  const { elt, target } = (event as CustomEvent<Failed>).detail;
  if (!elt.hasAttribute("data-refreshes")) tell("the server does not answer; nothing was changed", target);
});

/** Where something was to appear, or else in passing. */
function tell(problem: string, target: Element): void {
  const awaited = target.classList.contains("skeleton") ? target : target.querySelector(".skeleton");
  if (!awaited) {
    toast(problem);
    return;
  }
  const said = document.createElement("p");
  said.className = "problem";
  said.setAttribute("role", "alert");
  said.textContent = problem;
  awaited.replaceWith(said);
}
document.body.addEventListener("htmx:afterSettle", () => {
  tellTimes();
  markFields();
});

/** The fields that the plan finds wrong: a problem names what the API calls it, `training.learning_rate` or `graders.1.pattern`. */
function markFields(): void {
  const plan = document.getElementById("plan");
  if (!plan) return;
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  for (const { dataset } of plan.querySelectorAll<HTMLElement>("[data-of]")) {
    const [, grader] = /^graders\.(\d+)/.exec(dataset["of"] ?? "") ?? [];
    const within = grader === undefined ? document : document.querySelectorAll(".grader")[Number(grader)];
    const name = (dataset["of"] ?? "").split(".").at(-1) ?? "";
    within?.querySelector(`[name="${CSS.escape(name)}"], [name$=".${CSS.escape(name)}"]`)?.setAttribute("aria-invalid", "true");
  }
}

document.addEventListener("click", (event) => {
  const pressed = (event.target as Element).closest<HTMLElement>("[data-does]");
  switch (pressed?.dataset["does"]) {
    case "theme": {
      const next = document.documentElement.dataset["theme"] === "dark" ? "light" : "dark";
      keepForGood("theme", next);
      document.documentElement.dataset["theme"] = next;
      break;
    }
    case "menu": {
      const rooms = document.querySelector(".rooms");
      const isOpen = rooms?.toggleAttribute("data-open") ?? false;
      pressed.setAttribute("aria-expanded", String(isOpen));
      break;
    }
    case "remove": {
      const form = pressed.closest("form");
      pressed.closest("[data-removable]")?.remove();
      form?.dispatchEvent(new Event("change", { bubbles: true }));
      break;
    }
    case "fill": {
      const field = document.getElementById(pressed.dataset["field"] ?? "") as HTMLInputElement;
      field.value = pressed.dataset["value"] ?? "";
      for (const type of ["input", "change"]) field.dispatchEvent(new Event(type, { bubbles: true }));
      break;
    }
    case "copy":
      void navigator.clipboard.writeText(pressed.dataset["text"] ?? "").then(() => toast("copied", "info"));
      break;
  }
});

keepDrafts();
tellTimes();
setInterval(tellTimes, 15_000);
