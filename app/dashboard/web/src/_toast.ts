// What went well or wrong, said where it is seen and read out, and gone after a while.
export function toast(message: string, kind: "problem" | "info" = "problem"): void {
  const place = document.getElementById("toasts");
  if (!place) return;
  const said = document.createElement("p");
  said.className = kind === "info" ? "problem info" : "problem";
  said.textContent = message;
  place.append(said);
  setTimeout(() => said.remove(), kind === "info" ? 5000 : 12000);
}
