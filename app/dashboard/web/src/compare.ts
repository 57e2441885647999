// Curves of several jobs over each other.
import type uPlot from "uplot";
import { ask } from "./_api";
import { Chart, type Series } from "./_chart";

interface Point {
  step: number;
  loss: number;
}

type Curve = "train" | "validation";

interface Job {
  id: string;
  series: Series;
}

const COLOURS = 8;
const page = document.getElementById("compare");
if (page) void draw(jobsOf(page));

function jobsOf(page: HTMLElement): Job[] {
  const heads = [...(page.parentElement?.querySelectorAll<HTMLElement>("th[data-job]") ?? [])];
  return heads.map((head, place) => ({
    id: head.dataset["job"] ?? "",
    series: {
      label: head.dataset["name"] ?? "",
      colour: `--series-${(place % COLOURS) + 1}`,
      ...(place < COLOURS ? {} : { dash: [6, 4] }),
    },
  }));
}

async function draw(jobs: Job[]): Promise<void> {
  const query = new URLSearchParams(jobs.map((job) => ["ids", job.id]));
  const curves = await ask<Record<string, Record<Curve, Point[]>>>(`/jobs/compare/curves?${query}`);
  for (const [id, of] of [["validation", "validation"], ["training", "train"]] as const) {
    const place = document.getElementById(id);
    if (!place) continue;
    const series = jobs.map((job) => ({ ...job.series, points: of === "validation" }));
    new Chart(place, { label: "loss", series }).show(together(jobs.map((job) => curves[job.id]?.[of] ?? [])));
  }
}

/** By step; null where a curve has no point. */
function together(curves: Point[][]): uPlot.AlignedData {
  const steps = [...new Set(curves.flat().map((point) => point.step))].sort((a, b) => a - b);
  const known = curves.map((curve) => new Map(curve.map((point) => [point.step, point.loss])));
  return [steps, ...known.map((losses) => steps.map((step) => losses.get(step) ?? null))];
}
