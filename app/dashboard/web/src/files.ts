// Files dropped or chosen go to the API, one after another, and say how far they are.
import { upload } from "./_upload";

const form = document.getElementById("drop") as HTMLFormElement;
const chosen = document.getElementById("chosen") as HTMLInputElement;
const purpose = document.getElementById("purpose") as HTMLSelectElement;
const list = document.getElementById("uploads") as HTMLUListElement;
let depth = 0; // of elements entered while something is dragged
let underWay = 0;

function over(by: number): void {
  depth = Math.max(0, depth + by);
  form.toggleAttribute("data-over", depth > 0);
}

form.addEventListener("dragenter", () => over(1));
form.addEventListener("dragleave", () => over(-1));
for (const type of ["dragover", "drop"] as const) {
  document.addEventListener(type, (event) => event.preventDefault()); // else a file beside the mark would replace the page
}
form.addEventListener("drop", (event) => {
  over(-depth);
  void uploadAll([...(event.dataTransfer?.files ?? [])]);
});
chosen.addEventListener("change", () => {
  void uploadAll([...(chosen.files ?? [])]);
  chosen.value = "";
});
form.addEventListener("submit", (event) => event.preventDefault());

async function uploadAll(files: File[]): Promise<void> {
  for (const file of files) await show(file);
}

async function show(file: File): Promise<void> {
  const [item, name, bar, state] = (["li", "span", "progress", "span"] as const).map((tag) => document.createElement(tag)) as [
    HTMLLIElement,
    HTMLSpanElement,
    HTMLProgressElement,
    HTMLSpanElement,
  ];
  name.textContent = file.name;
  bar.max = 1;
  bar.value = 0;
  bar.setAttribute("aria-label", `upload of ${file.name}`);
  state.className = "small muted numbers";
  item.append(name, bar, state);
  list.append(item);
  underWay += 1;
  try {
    await upload(file, purpose.value, Number(form.dataset["partBytes"]), {
      share: (share) => {
        bar.value = share;
        state.textContent = share < 1 ? `${Math.floor(share * 100)} %` : "sent; it is being put away";
      },
      waits: (reason) => (state.textContent = reason && `${reason}; it goes on by itself`),
    });
    item.remove();
    document.body.dispatchEvent(new CustomEvent("uploaded"));
  } catch (problem) {
    bar.remove();
    state.remove();
    name.textContent = `${file.name}: ${problem instanceof Error ? problem.message : String(problem)}`;
    name.className = "bad";
  } finally {
    underWay -= 1;
  }
}

window.addEventListener("beforeunload", (event) => {
  if (underWay > 0) event.preventDefault(); // the browser asks whether to leave
});
