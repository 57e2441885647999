// One job, as it happens: curves and log follow the events, and survive lost connections by the id of the last one.
import htmx from "htmx.org";
import type uPlot from "uplot";
import { ask } from "./_api";
import { Chart } from "./_chart";
import { smoothed, smoothing } from "./_smooth";
import { timeOfDay } from "./_time";

interface Curves {
  train: { step: number; loss: number; low: number; high: number; learning_rate: number; tokens_per_second: number }[];
  validation: { step: number; loss: number }[];
  last_event_id: string | null;
}

interface JobEvent {
  id: string;
  created_at: number;
  level: "info" | "warn" | "error";
  message: string;
  type: "message" | "metrics";
  data: Record<string, number> | null;
}

const RECONNECT_MILLISECONDS = 2000;
const MOST_POINTS = 2000; // then they are asked for anew, and the server leaves some out
const page = document.getElementById("job");
if (page) follow(page, page.dataset["job"] ?? "");

function follow(page: HTMLElement, id: string): void {
  const loss = new Chart(element("loss"), {
    label: "loss",
    series: [
      { label: "highest", colour: "--accent", width: 0, isBand: true },
      { label: "lowest", colour: "--accent", width: 0, isBand: true },
      { label: "as measured", colour: "--accent", width: 1, isFaint: true },
      { label: "training loss", colour: "--accent" },
      { label: "validation loss", colour: "--live", width: 2.25, points: true },
    ],
  });
  const rate = new Chart(element("rate"), { label: "learning rate", series: [{ label: "learning rate", colour: "--accent" }] });
  const speed = new Chart(element("speed"), {
    label: "tokens a second",
    unit: "tokens/s",
    series: [{ label: "speed", colour: "--live" }],
  });
  let curves: Curves = { train: [], validation: [], last_event_id: null };
  const share = smoothing(() => {
    if (page.dataset["curves"] === "drawn") draw();
  });
  const refreshed = throttled(() => htmx.trigger("#job-state", "refresh", {}), 1000);
  const outcomeRefreshed = throttled(() => htmx.trigger("#outcome", "refresh", {}), 1000);

  function draw(): void {
    const steps = curves.train.map((point) => point.step);
    const isEmpty = steps.length + curves.validation.length === 0;
    page.dataset["curves"] = isEmpty ? "none" : "drawn";
    if (isEmpty) return;
    loss.show(lossData(curves, share()));
    rate.show([steps, curves.train.map((point) => point.learning_rate)]);
    speed.show([steps, curves.train.map((point) => point.tokens_per_second)]);
  }

  async function load(): Promise<void> {
    curves = await ask<Curves>(`/jobs/${id}/curves`);
    draw();
  }

  function note(event: JobEvent): void {
    const data = event.data;
    if (event.type === "metrics" && data) {
      const step = data["step"] ?? 0;
      if (data["train_loss"] !== undefined) {
        curves.train = curves.train.filter((point) => point.step < step); // a resumed attempt goes over steps again
        const loss = data["train_loss"];
        const [learning_rate, tokens_per_second] = [data["learning_rate"] ?? 0, data["tokens_per_second"] ?? 0];
        curves.train.push({ step, loss, low: loss, high: loss, learning_rate, tokens_per_second });
      }
      if (data["valid_loss"] !== undefined) {
        curves.validation = curves.validation.filter((point) => point.step < step);
        curves.validation.push({ step, loss: data["valid_loss"] });
      }
      if (curves.train.length > MOST_POINTS) void load();
      else draw();
    } else {
      log(event);
      outcomeRefreshed(); // a checkpoint, or the end
    }
    refreshed();
  }

  function listen(): void {
    const after = curves.last_event_id ? `&after=${encodeURIComponent(curves.last_event_id)}` : "";
    const source = new EventSource(`/v1/fine_tuning/jobs/${id}/events?stream=true${after}`);
    source.onopen = () => page.setAttribute("data-follows", "");
    source.onerror = () => {
      page.removeAttribute("data-follows");
      // after a lost connection the browser connects again by itself; after a proxy's 502 it gives up
      if (source.readyState === EventSource.CLOSED) setTimeout(listen, RECONNECT_MILLISECONDS);
    };
    source.onmessage = (message: MessageEvent<string>) => {
      if (message.lastEventId) curves.last_event_id = message.lastEventId;
      if (message.data === "[DONE]") {
        source.close();
        refreshed();
        outcomeRefreshed();
      } else {
        note(JSON.parse(message.data) as JobEvent);
      }
    };
  }

  void load().then(() => {
    if (!page.hasAttribute("data-is-over")) listen();
  });
}

function lossData(curves: Curves, share: number): uPlot.AlignedData {
  const steps = [...new Set([...curves.train, ...curves.validation].map((point) => point.step))].sort((a, b) => a - b);
  const train = new Map(curves.train.map((point) => [point.step, point]));
  const validation = new Map(curves.validation.map((point) => [point.step, point.loss]));
  const of = (read: (point: Curves["train"][number]) => number) => steps.map((step) => {
    const point = train.get(step);
    return point ? read(point) : null;
  });
  const measured = of((point) => point.loss);
  return [
    steps,
    of((point) => point.high),
    of((point) => point.low),
    measured,
    smoothed(steps, measured, share),
    steps.map((step) => validation.get(step) ?? null),
  ];
}

function log(event: JobEvent): void {
  const list = element("log");
  if (document.getElementById(event.id)) return;
  const [line, time, said] = [document.createElement("li"), document.createElement("time"), document.createElement("p")];
  const instant = new Date(event.created_at * 1000);
  line.id = event.id;
  time.dateTime = instant.toISOString();
  time.dataset["as"] = "clock";
  time.textContent = timeOfDay(instant);
  said.textContent = event.message;
  said.className = event.level;
  line.append(time, said);
  list.prepend(line);
}

function element(id: string): HTMLElement {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no #${id}`);
  return found;
}

function throttled(act: () => void, milliseconds: number): () => void {
  let waits = false;
  return () => {
    if (waits) return;
    waits = true;
    setTimeout(() => {
      waits = false;
      act();
    }, milliseconds);
  };
}
