// Curves of several jobs over each other.
import { ask } from "./_api";
import { Chart, type Series } from "./_chart";
import { smoothed, smoothing } from "./_smooth";

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
  const [validation, training] = [document.getElementById("validation"), document.getElementById("training")];
  if (!validation || !training) return;
  const of = (curve: Curve) => together(jobs.map((job) => curves[job.id]?.[curve] ?? []));
  const series = jobs.map((job) => job.series);
  new Chart(validation, { label: "loss", series: series.map((one) => ({ ...one, points: true })) }).show(of("validation"));
  const measured = series.map((one) => ({ ...one, width: 1, isFaint: true }));
  const chart = new Chart(training, { label: "loss", series: [...measured, ...series] });
  const [steps, ...losses] = of("train");
  const share = smoothing(() => show());
  const show = () => chart.show([steps, ...losses, ...losses.map((loss) => smoothed(steps, loss, share()))]);
  show();
}

/** By step; null where a curve has no point. */
function together(curves: Point[][]): [number[], ...(number | null)[][]] {
  const steps = [...new Set(curves.flat().map((point) => point.step))].sort((a, b) => a - b);
  const known = curves.map((curve) => new Map(curve.map((point) => [point.step, point.loss])));
  return [steps, ...known.map((losses) => steps.map((step) => losses.get(step) ?? null))];
}
