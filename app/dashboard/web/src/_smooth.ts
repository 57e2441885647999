// Curves without their noise: each point averaged with those before it, the nearer the more, over a share of all steps.
import { keepForGood, keptForGood } from "./_kept";

const KEPT_AS = "smoothing";

/** `values` by `steps`, null where there is none. `share` of the steps is how far back a point still counts for 1/e. */
export function smoothed(steps: readonly number[], values: readonly (number | null)[], share: number): (number | null)[] {
  const length = share * ((steps.at(-1) ?? 0) - (steps[0] ?? 0));
  if (length === 0) return [...values];
  let [sum, weight, before] = [0, 0, 0];
  return values.map((value, place) => {
    const step = steps[place];
    if (value === null || step === undefined) return null;
    const kept = Math.exp((before - step) / length);
    [sum, weight, before] = [sum * kept + value, weight * kept + 1, step];
    return sum / weight;
  });
}

/** The slider of the page, as it was left on any page. `draw` is called when it is moved. Returns what it says. */
export function smoothing(draw: () => void): () => number {
  const slider = document.querySelector<HTMLInputElement>("input.smoothing");
  const told = slider?.parentElement?.querySelector("output");
  if (!slider || !told) return () => 0;
  const tell = () => {
    told.textContent = slider.value === "0" ? "off" : `${slider.value} % of the steps`;
  };
  slider.value = keptForGood(KEPT_AS) ?? "0";
  tell();
  slider.addEventListener("input", () => {
    keepForGood(KEPT_AS, slider.value);
    tell();
    draw();
  });
  return () => Number(slider.value) / 100;
}
