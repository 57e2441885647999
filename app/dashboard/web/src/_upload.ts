// A file on its way to the API: whole if it is small, else in parts, of which those that have arrived are not sent again.
import { ApiError, ask, csrfToken, json, problemIn } from "./_api";

const PART_BYTES = 16 * 1024 * 1024;
const SENDERS = 3;
const PATIENCE_SECONDS = 300; // for a server that does not answer
const LONGEST_PAUSE_SECONDS = 10;

export interface Progress {
  /** Of the bytes that have been sent, from 0 to 1. */
  share(share: number): void;
  /** Why it stands still; empty when it goes on. */
  waits(reason: string): void;
}

interface Part {
  id: string;
}

interface Upload {
  id: string;
  status: string;
  parts: Part[];
}

/** What is remembered of an upload in this browser, so that the same file goes on after a reload. */
interface Note {
  id: string;
  partBytes: number;
  parts: Record<number, string>;
}

class Unreachable extends Error {}

export async function upload(file: File, purpose: string, mostPartBytes: number, progress: Progress): Promise<void> {
  const partBytes = Math.min(PART_BYTES, mostPartBytes);
  if (file.size <= partBytes) {
    await sendForm("/v1/files", { purpose, file }, (sent) => progress.share(sent / Math.max(1, file.size)));
  } else {
    await inParts(file, purpose, partBytes, progress);
  }
}

async function inParts(file: File, purpose: string, partBytes: number, progress: Progress): Promise<void> {
  const key = `upload ${purpose} ${file.name} ${file.size} ${file.lastModified}`;
  const note = (await begun(key)) ?? (await begin(file, purpose, partBytes));
  const sent = new Map<number, number>(); // bytes by part
  const count = Math.ceil(file.size / note.partBytes);
  const sizeOf = (index: number) => Math.min(note.partBytes, file.size - index * note.partBytes);
  const left = [...Array(count).keys()].filter((index) => {
    if (note.parts[index] !== undefined) sent.set(index, sizeOf(index));
    return note.parts[index] === undefined;
  });
  const tell = () => progress.share([...sent.values()].reduce((sum, bytes) => sum + bytes, 0) / file.size);
  const remember = () => localStorage.setItem(key, JSON.stringify(note));
  remember();
  tell();

  async function work(): Promise<void> {
    for (let index = left.shift(); index !== undefined; index = left.shift()) {
      const [place, start] = [index, index * note.partBytes];
      const data = file.slice(start, start + sizeOf(place));
      const part = await patiently(progress, () =>
        sendForm<Part>(`/v1/uploads/${note.id}/parts`, { data }, (bytes) => {
          sent.set(place, Math.min(bytes, data.size));
          tell();
        }),
      );
      sent.set(place, data.size);
      note.parts[place] = part.id;
      remember();
      tell();
    }
  }
  try {
    await Promise.all(Array.from({ length: SENDERS }, work));
    const part_ids = [...Array(count).keys()].map((index) => note.parts[index]);
    await patiently(progress, () => ask(`/v1/uploads/${note.id}/complete`, json({ part_ids })));
    localStorage.removeItem(key);
  } catch (problem) {
    left.length = 0; // the other senders end with what they have in hand
    throw problem instanceof Unreachable ? new Error(`${problem.message}; choose it again, and it goes on where it stopped`) : problem;
  }
}

async function begin(file: File, purpose: string, partBytes: number): Promise<Note> {
  const asked = { filename: file.name, bytes: file.size, purpose, mime_type: "text/jsonl" };
  const made = await ask<Upload>("/v1/uploads", json(asked));
  return { id: made.id, partBytes, parts: {} };
}

/** The upload of this very file that was not brought to its end, if the server still has it. */
async function begun(key: string): Promise<Note | null> {
  const kept = localStorage.getItem(key);
  if (!kept) return null;
  const note = JSON.parse(kept) as Note;
  try {
    const upload = await ask<Upload>(`/v1/uploads/${note.id}`);
    const arrived = new Set(upload.parts.map((part) => part.id));
    note.parts = Object.fromEntries(Object.entries(note.parts).filter(([, id]) => arrived.has(id)));
    return upload.status === "pending" ? note : null;
  } catch (problem) {
    if (problem instanceof ApiError && problem.status === 404) return null;
    throw problem;
  }
}

/** Again and again while the server is away or busy: it is restarted, or a train is in a tunnel. */
async function patiently<T>(progress: Progress, send: () => Promise<T>): Promise<T> {
  const until = Date.now() + PATIENCE_SECONDS * 1000;
  for (let pause = 1; ; pause = Math.min(pause * 2, LONGEST_PAUSE_SECONDS)) {
    try {
      const answer = await send();
      progress.waits("");
      return answer;
    } catch (problem) {
      const mayPass = !(problem instanceof ApiError) || problem.status >= 500 || problem.status === 429 || problem.status === 409;
      if (!mayPass) throw problem;
      const why = problem instanceof ApiError ? problem.message : "the server does not answer";
      if (Date.now() > until) throw new Unreachable(why);
      progress.waits(why);
      await new Promise((resolve) => setTimeout(resolve, pause * 1000));
    }
  }
}

/** By XMLHttpRequest, which alone tells how much of a body was sent. Rejects with ApiError, or Error where nobody answers. */
function sendForm<T>(path: string, fields: Record<string, string | Blob>, onSent: (bytes: number) => void): Promise<T> {
  return new Promise((resolve, reject) => {
    const body = new FormData();
    for (const [name, value] of Object.entries(fields)) body.append(name, value);
    const request = new XMLHttpRequest();
    request.open("POST", path);
    request.setRequestHeader("x-csrf-token", csrfToken());
    request.upload.onprogress = (event) => onSent(event.loaded);
    request.onerror = () => reject(new Error("the server does not answer; choose it again"));
    request.onload = () => {
      if (request.status === 200) resolve(JSON.parse(request.responseText) as T);
      else reject(new ApiError(request.status, problemIn(request.status, request.responseText)));
    };
    request.send(body);
  });
}
