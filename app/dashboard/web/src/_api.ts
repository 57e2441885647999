// The public API, asked by whoever is signed in. Changes carry the token that only pages of ours know.
export interface Problem {
  message: string;
  param: string | null;
  code: string | null;
}

export class ApiError extends Error {
  constructor(
    readonly status: number,
    readonly problem: Problem,
  ) {
    super(problem.message);
  }
}

export function csrfToken(): string {
  return document.querySelector<HTMLMetaElement>('meta[name="csrf-token"]')?.content ?? "";
}

export async function ask<T>(path: string, options: RequestInit = {}): Promise<T> {
  const answer = await send(path, options);
  return (await answer.json()) as T;
}

/** The answer itself, for whoever reads it as it comes. Raises ApiError with what the server said. */
export async function send(path: string, options: RequestInit = {}): Promise<Response> {
  const headers = new Headers(options.headers);
  headers.set("x-csrf-token", csrfToken());
  const answer = await fetch(path, { ...options, headers });
  if (!answer.ok) throw new ApiError(answer.status, await problemOf(answer));
  return answer;
}

export function json(body: unknown): RequestInit {
  return { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
}

async function problemOf(answer: Response): Promise<Problem> {
  return problemIn(answer.status, await answer.text().catch(() => ""));
}

/** What an answer says is wrong; a proxy's says nothing that could be read. */
export function problemIn(status: number, body: string): Problem {
  try {
    return (JSON.parse(body) as { error: Problem }).error;
  } catch {
    return { message: `the server answered ${status}; try again`, param: null, code: null };
  }
}
