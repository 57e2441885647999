// One question to several models at once: the same seed, answers side by side as they come, and how fast they came.
import { ApiError, ask, json, send } from "./_api";
import { told } from "./_chart";
import { entriesOf, fill, keep, kept, type Entries } from "./_kept";
import { toast } from "./_toast";

interface Model {
  id: string;
  owned_by: string;
  base_model: string;
  alias_of: string | null;
}

interface Message {
  role: "system" | "user" | "assistant";
  content: string;
}

interface Chunk {
  choices: { delta: { content?: string | null }; finish_reason: string | null }[];
  usage?: { completion_tokens: number } | null;
  error?: { message: string };
}

/** What a reload brings back. */
interface Kept {
  settings: Entries;
  columns: Conversation[];
}

interface Conversation {
  model: string;
  mixedWith: string;
  weight: number;
  history: Message[];
}

const columns = document.getElementById("columns") as HTMLElement;
const template = document.getElementById("column") as HTMLTemplateElement;
const form = document.getElementById("ask") as HTMLFormElement;
const MOST = 4;
const KEPT_AS = `playground${location.search}`;
let models: Model[] = [];

class Column {
  readonly root: HTMLElement;
  private readonly history: Message[] = [];
  private stopping: AbortController | undefined;

  constructor(chosen: string, before?: Conversation) {
    this.root = (template.content.cloneNode(true) as DocumentFragment).firstElementChild as HTMLElement;
    const select = this.find<HTMLSelectElement>("select.model");
    for (const model of models) select.add(new Option(nameOf(model), model.id));
    if (models.some((model) => model.id === chosen)) select.value = chosen;
    select.addEventListener("change", () => {
      this.offerMix();
      remember();
    });
    this.find(".remove").addEventListener("click", () => this.remove());
    this.find(".mix-weight").addEventListener("input", () => {
      this.tellWeight();
      remember();
    });
    this.find(".curl").addEventListener("click", () => void copy(asCurl(this.asked())));
    this.find(".python").addEventListener("click", () => void copy(asPython(this.asked())));
    columns.append(this.root);
    this.offerMix();
    if (before) this.goOn(before);
  }

  conversation(): Conversation {
    const mixedWith = this.find<HTMLSelectElement>(".mix-with").value;
    return { model: this.model, mixedWith, weight: this.weight, history: this.history };
  }

  private goOn(before: Conversation): void {
    this.find<HTMLSelectElement>(".mix-with").value = before.mixedWith;
    this.find<HTMLInputElement>(".mix-weight").value = String(before.weight);
    this.tellWeight();
    for (const { role, content } of before.history) this.say(role, content);
    this.history.push(...before.history);
  }

  /** What the API is asked: a mix of two adapters is asked of their base. */
  body(): Record<string, unknown> {
    const settings = new FormData(form);
    const number = (name: string) => Number(settings.get(name));
    const system = String(settings.get("system") ?? "").trim();
    const messages: Message[] = [...(system ? [{ role: "system" as const, content: system }] : []), ...this.history];
    const asked = { messages, temperature: number("temperature"), max_tokens: number("max_tokens"), seed: number("seed") };
    const [model, other] = [this.model, this.find<HTMLSelectElement>(".mix-with").value];
    if (!other) return { model, ...asked };
    const weight = this.weight;
    const base = models.find((one) => one.id === model)?.base_model ?? model;
    const adapters = [{ model, weight: round(1 - weight) }, { model: other, weight }].filter((one) => one.weight !== 0);
    return { model: base, adapters, ...asked };
  }

  /** The same up to the last question, for whoever wants to ask it elsewhere. */
  private asked(): Record<string, unknown> {
    const body = this.body();
    const messages = body["messages"] as Message[];
    const last = messages.map((message) => message.role).lastIndexOf("user");
    return { ...body, messages: last < 0 ? [...messages, { role: "user", content: "Hello" }] : messages.slice(0, last + 1) };
  }

  async answer(question: string): Promise<void> {
    this.stopping?.abort();
    this.stopping = new AbortController();
    this.history.push({ role: "user", content: question });
    const said = this.say("assistant", "");
    this.say("user", question, said);
    const began = performance.now();
    let [first, text, tokens] = [0, "", 0];
    said.setAttribute("aria-busy", "true");
    try {
      const body = { ...this.body(), stream: true, stream_options: { include_usage: true } };
      const answer = await send("/v1/chat/completions", { ...json(body), signal: this.stopping.signal });
      for await (const chunk of chunks(answer)) {
        if (chunk.error) throw new Error(chunk.error.message);
        const piece = chunk.choices[0]?.delta.content ?? "";
        if (piece && !first) first = performance.now();
        text += piece;
        said.textContent = text;
        tokens = chunk.usage?.completion_tokens ?? tokens;
        this.tell(began, first, tokens);
      }
      this.history.push({ role: "assistant", content: text });
      remember();
    } catch (problem) {
      this.history.pop();
      if (this.stopping.signal.aborted) return;
      said.className = "problem";
      said.textContent = problem instanceof ApiError || problem instanceof Error ? problem.message : String(problem);
    } finally {
      said.removeAttribute("aria-busy");
    }
  }

  clear(): void {
    this.stopping?.abort();
    this.history.length = 0;
    this.find(".turns").replaceChildren();
    this.find(".speed").textContent = "";
    remember();
  }

  get model(): string {
    return this.find<HTMLSelectElement>("select.model").value;
  }

  private get weight(): number {
    return Number(this.find<HTMLInputElement>(".mix-weight").value);
  }

  private say(role: Message["role"], text: string, before: HTMLElement | null = null): HTMLElement {
    const turn = document.createElement("p");
    turn.className = `turn ${role}`;
    turn.textContent = text;
    this.find(".turns").insertBefore(turn, before);
    turn.scrollIntoView({ block: "nearest" });
    return turn;
  }

  private tell(began: number, first: number, tokens: number): void {
    if (!first) return;
    const seconds = (performance.now() - first) / 1000;
    const speed = tokens > 1 && seconds > 0 ? ` · ${told((tokens - 1) / seconds)} tokens/s` : "";
    this.find(".speed").textContent = `first token after ${Math.round(first - began)} ms${speed}`;
  }

  /** Only tuned models of one base can be mixed. */
  private offerMix(): void {
    const own = models.find((model) => model.id === this.model);
    const others = models.filter((one) => isTuned(one) && one.base_model === own?.base_model && one.id !== own.id);
    const select = this.find<HTMLSelectElement>(".mix-with");
    select.replaceChildren(new Option("nothing", ""), ...others.map((one) => new Option(nameOf(one), one.id)));
    this.find(".mix").toggleAttribute("hidden", !own || !isTuned(own) || others.length === 0);
    select.onchange = () => {
      this.tellWeight();
      remember();
    };
    this.tellWeight();
  }

  private tellWeight(): void {
    const isMixed = this.find<HTMLSelectElement>(".mix-with").value !== "";
    this.find(".mix-slider").toggleAttribute("hidden", !isMixed);
    this.find(".mix-told").textContent = `${Math.round((1 - this.weight) * 100)} % to ${Math.round(this.weight * 100)} %`;
  }

  private remove(): void {
    this.stopping?.abort();
    this.root.remove();
    all.splice(all.indexOf(this), 1);
    tellNumber();
    remember();
  }

  private find<T extends Element = HTMLElement>(selector: string): T {
    return this.root.querySelector<T>(selector) as T;
  }
}

const all: Column[] = [];

function isTuned(model: Model): boolean {
  return model.owned_by !== "base" && model.alias_of === null;
}

/** The name that was given, and enough of the rest to tell two apart. */
function nameOf(model: Model): string {
  if (model.alias_of) return `${model.id} → ${model.alias_of}`;
  const [kind, base, , suffix, run, checkpoint] = model.id.split(":");
  if (kind !== "ft") return model.id;
  return [suffix || base, run, checkpoint?.replace("ckpt-step-", "step ")].filter(Boolean).join(" · ");
}

function round(value: number): number {
  return Math.round(value * 100) / 100;
}

async function* chunks(answer: Response): AsyncGenerator<Chunk> {
  const reader = answer.body?.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part = await reader?.read(); part && !part.done; part = await reader?.read()) {
    const lines = (rest + part.value).split("\n");
    rest = lines.pop() ?? "";
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6)) as Chunk;
    }
  }
}

function asCurl(body: unknown): string {
  const text = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const headers = "-H \"Authorization: Bearer $OPENAI_API_KEY\" -H 'Content-Type: application/json'";
  return `curl ${location.origin}/v1/chat/completions ${headers} -d '${text}'`;
}

function asPython(body: Record<string, unknown>): string {
  const { adapters, ...known } = body;
  const lines = Object.entries(known).map(([name, value]) => `    ${name}=${python(value)},`);
  if (adapters) lines.push(`    extra_body={"adapters": ${python(adapters)}},`);
  return [
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${location.origin}/v1")  # OPENAI_API_KEY: one of ${location.origin}/keys`,
    "answer = client.chat.completions.create(",
    ...lines,
    ")",
    "print(answer.choices[0].message.content)",
  ].join("\n");
}

/** JSON is Python but for three words, none of which a body of ours has outside of text. */
function python(value: unknown): string {
  return JSON.stringify(value);
}

async function copy(text: string): Promise<void> {
  await navigator.clipboard.writeText(text);
  toast("copied", "info");
}

function tellNumber(): void {
  columns.dataset["number"] = String(all.length);
  (document.getElementById("add") as HTMLButtonElement).disabled = all.length >= MOST;
}

function add(model: string, before?: Conversation): void {
  all.push(new Column(model, before));
  tellNumber();
}

/** A question that has no answer yet is not kept: after a reload nobody waits for it. */
function remember(): void {
  const answered = all.map((column) => column.conversation()).map((said) => ({ ...said, history: pairs(said.history) }));
  keep(KEPT_AS, { settings: entriesOf(form), columns: answered } satisfies Kept);
}

function pairs(history: Message[]): Message[] {
  return history.at(-1)?.role === "user" ? history.slice(0, -1) : history;
}

function bringBack({ settings, columns }: Kept): void {
  fill(form, settings);
  for (const before of columns) if (models.some((model) => model.id === before.model)) add(before.model, before);
}

form.addEventListener("input", remember);

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const question = form.elements.namedItem("question") as HTMLTextAreaElement;
  const text = question.value.trim();
  if (!text) return;
  question.value = "";
  remember();
  void ready.then(() => all.forEach((column) => void column.answer(text))); // somebody may be faster than the list of models
});
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && (event.target as Element).id === "question") {
    event.preventDefault();
    form.requestSubmit();
  }
});
document.getElementById("add")?.addEventListener("click", () => {
  add(all.at(-1)?.model ?? "");
  remember();
});
document.getElementById("clear")?.addEventListener("click", () => all.forEach((column) => column.clear()));

/** What the list leaves out, such as checkpoints, is asked for by name. */
async function known(asked: string[]): Promise<Model[]> {
  const listed = (await ask<{ data: Model[] }>("/v1/models")).data;
  const missing = asked.filter((id) => !listed.some((model) => model.id === id));
  const found = missing.map((id) =>
    ask<Model>(`/v1/models/${encodeURIComponent(id)}`).catch((problem: unknown) => {
      toast(problem instanceof Error ? problem.message : String(problem));
      return null;
    }),
  );
  return [...listed, ...(await Promise.all(found)).filter((model) => model !== null)];
}

const asked = new URLSearchParams(location.search).getAll("model").slice(0, MOST);
const ready = known(asked)
  .then((data) => {
    const served = new Set((columns.dataset["served"] ?? "").split(" "));
    models = data.filter((model) => served.has(model.base_model));
    models.sort((a, b) => Number(isTuned(b)) - Number(isTuned(a)) || b.id.localeCompare(a.id));
    const before = kept<Kept>(KEPT_AS);
    if (before) bringBack(before);
    if (all.length) return;
    const tuned = models.find(isTuned);
    const wanted = asked.filter((id) => models.some((model) => model.id === id));
    const chosen = wanted.length ? wanted : [tuned?.base_model ?? models[0]?.id ?? "", ...(tuned ? [tuned.id] : [])];
    for (const model of chosen.slice(0, MOST)) add(model);
  })
  .catch((problem: unknown) => toast(String(problem)));
