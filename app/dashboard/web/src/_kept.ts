// What a page keeps of itself over a reload, in this tab alone; and what somebody likes, for all pages.
export function keep(key: string, value: unknown): void {
  sessionStorage.setItem(key, JSON.stringify(value));
}

export function kept<T>(key: string): T | null {
  const text = sessionStorage.getItem(key);
  return text === null ? null : (JSON.parse(text) as T);
}

/** Fields of a form by name, as they were; of a group of radio buttons that chooses the one. */
export function fill(form: HTMLFormElement, values: Record<string, string>): void {
  for (const [name, value] of Object.entries(values)) {
    const field = form.elements.namedItem(name);
    if (field && "value" in field) field.value = value;
  }
}

export function keepForGood(key: string, value: string): void {
  localStorage.setItem(key, value);
}

export function keptForGood(key: string): string | null {
  return localStorage.getItem(key);
}

export function forget(key: string): void {
  sessionStorage.removeItem(key);
}
