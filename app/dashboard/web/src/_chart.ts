// Curves by step: colours of the theme, one look for all.
import uPlot from "uplot";

export interface Series {
  label: string;
  colour: string; // a CSS variable
  width?: number;
  dash?: number[];
  points?: boolean;
  isBand?: boolean; // the edge of a band, which the legend leaves out
  isFaint?: boolean; // what lies behind a smoothed curve; the legend leaves it out too
}

export interface ChartOptions {
  series: Series[];
  unit?: string;
  logarithmic?: boolean;
  label: string;
}

const [FAINT, FAINTER] = ["55", "33"]; // behind a colour #rrggbb
const WHOLE = [1, 2, 5].flatMap((digit) => Array.from({ length: 8 }, (_, zeros) => digit * 10 ** zeros)).sort((a, b) => a - b);

function css(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

export function told(value: number | null | undefined): string {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 0.001 && size < 1e6 ? String(Number(value.toPrecision(4))) : value.toExponential(2).replace(/\.?0+e/, "e");
}

export class Chart {
  private plot: uPlot | undefined;
  private data: uPlot.AlignedData = [[]];
  private isDrawing = false;

  constructor(
    private readonly place: HTMLElement,
    private readonly options: ChartOptions,
  ) {
    new ResizeObserver(() => this.resize()).observe(place);
    new MutationObserver(() => this.rebuild()).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  }

  /** Draws at the next frame, however often it is called until then. */
  show(data: uPlot.AlignedData): void {
    this.data = data;
    if (this.isDrawing) return;
    this.isDrawing = true;
    requestAnimationFrame(() => {
      this.isDrawing = false;
      if (this.plot) this.plot.setData(this.data);
      else this.rebuild();
    });
  }

  private resize(): void {
    this.plot?.setSize(this.size());
  }

  private size(): { width: number; height: number } {
    return { width: this.place.clientWidth, height: this.place.clientHeight - 28 };
  }

  private rebuild(): void {
    this.plot?.destroy();
    const axis = { stroke: css("--muted"), grid: { stroke: css("--line"), width: 1 }, ticks: { show: false }, font: "12px Inter" };
    const unit = this.options.unit ? ` ${this.options.unit}` : "";
    this.plot = new uPlot(
      {
        ...this.size(),
        padding: [8, 20, 0, 0],
        scales: { x: { time: false }, y: this.options.logarithmic ? { distr: 3 } : {} },
        axes: [
          { ...axis, size: 28, incrs: WHOLE },
          { ...axis, size: 56, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : told(tick))) },
        ],
        cursor: { y: false, points: { size: 6 } },
        series: [
          { label: "step", value: (_, step) => (step === null ? "–" : String(step)) },
          ...this.options.series.map((series) => ({
            label: series.label,
            ...(series.isBand || series.isFaint ? { class: "unlisted" } : {}),
            stroke: css(series.colour) + (series.isFaint ? FAINT : ""),
            width: series.width ?? 1.75,
            ...(series.dash ? { dash: series.dash } : {}),
            points: { show: series.points ?? false, size: 6, fill: css(series.colour) },
            spanGaps: true,
            value: (_: uPlot, value: number | null) => told(value) + (value === null ? "" : unit),
          })),
        ],
        // the edges of a band come first, the upper before the lower
        bands: this.options.series[0]?.isBand ? [{ series: [1, 2], fill: css(this.options.series[0].colour) + FAINTER }] : [],
      },
      this.data,
      this.place,
    );
  }
}
