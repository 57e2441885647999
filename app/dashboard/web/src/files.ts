// Files dropped or chosen go to the API, one after another, and say how far they are.
import { csrfToken } from "./_api";

const form = document.getElementById("drop") as HTMLFormElement;
const chosen = document.getElementById("chosen") as HTMLInputElement;
const purpose = document.getElementById("purpose") as HTMLSelectElement;
const list = document.getElementById("uploads") as HTMLUListElement;
let depth = 0; // of elements entered while something is dragged

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
  for (const file of files) await upload(file);
}

async function upload(file: File): Promise<void> {
  const item = document.createElement("li");
  const name = document.createElement("span");
  const bar = document.createElement("progress");
  name.textContent = file.name;
  bar.max = 1;
  bar.value = 0;
  bar.setAttribute("aria-label", `upload of ${file.name}`);
  item.append(name, bar);
  list.append(item);
  try {
    await send(file, (share) => (bar.value = share));
    item.remove();
    document.body.dispatchEvent(new CustomEvent("uploaded"));
  } catch (problem) {
    bar.remove();
    name.textContent = `${file.name}: ${problem instanceof Error ? problem.message : String(problem)}`;
    name.className = "bad";
  }
}

/** By XMLHttpRequest, which alone tells how much of a body was sent. */
function send(file: File, onShare: (share: number) => void): Promise<void> {
  return new Promise((resolve, reject) => {
    const body = new FormData();
    body.append("purpose", purpose.value);
    body.append("file", file);
    const request = new XMLHttpRequest();
    request.open("POST", "/v1/files");
    request.setRequestHeader("x-csrf-token", csrfToken());
    request.upload.onprogress = (event) => event.lengthComputable && onShare(event.loaded / event.total);
    request.onerror = () => reject(new Error("the server does not answer; drop it again"));
    request.onload = () => (request.status === 200 ? resolve() : reject(new Error(problemIn(request))));
    request.send(body);
  });
}

function problemIn(request: XMLHttpRequest): string {
  try {
    return (JSON.parse(request.responseText) as { error: { message: string } }).error.message;
  } catch {
    return `the server answered ${request.status}`;
  }
}
