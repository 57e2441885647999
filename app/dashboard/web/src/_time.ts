// Instants as people say them: "4 min ago", with the exact one on hover.
const units: [Intl.RelativeTimeFormatUnit, number][] = [
  ["day", 86400],
  ["hour", 3600],
  ["minute", 60],
];
const relative = new Intl.RelativeTimeFormat("en", { numeric: "auto", style: "short" });
const exact = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const clock = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });

export function ago(instant: Date): string {
  const seconds = (instant.getTime() - Date.now()) / 1000;
  for (const [unit, length] of units) {
    if (Math.abs(seconds) >= length) return told(Math.trunc(seconds / length), unit);
  }
  return Math.abs(seconds) < 45 ? "just now" : told(Math.trunc(seconds), "second");
}

/** Without the full stops of abbreviations: it stands within sentences. */
function told(value: number, unit: Intl.RelativeTimeFormatUnit): string {
  return relative.format(value, unit).replace(".", "");
}

export function timeOfDay(instant: Date): string {
  return clock.format(instant);
}

/** Says all instants below `root` anew. */
export function tellTimes(root: ParentNode = document): void {
  for (const element of root.querySelectorAll<HTMLTimeElement>("time[datetime]")) {
    const instant = new Date(element.dateTime);
    element.title = exact.format(instant);
    element.textContent = element.dataset["as"] === "clock" ? timeOfDay(instant) : ago(instant);
  }
}
