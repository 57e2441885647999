// Loaded before the page is drawn, so that it is drawn once: the theme that was chosen here, or the system's.
const chosen = localStorage.getItem("theme");
const dark = matchMedia("(prefers-color-scheme: dark)");

function show(): void {
  document.documentElement.dataset["theme"] = localStorage.getItem("theme") ?? (dark.matches ? "dark" : "light");
}

if (chosen !== "dark" && chosen !== "light") localStorage.removeItem("theme");
dark.addEventListener("change", show);
show();
