// What a page keeps of itself over a reload, in this tab alone; and what somebody likes, for all pages.
export function keep(key: string, value: unknown): void {
  sessionStorage.setItem(key, JSON.stringify(value));
}

export function kept<T>(key: string): T | null {
  const text = sessionStorage.getItem(key);
  return text === null ? null : (JSON.parse(text) as T);
}

/** Of a form's fields, by name; several of one name that is chosen several times. */
export type Entries = [string, string][];

export function entriesOf(form: HTMLFormElement): Entries {
  return [...new FormData(form)].map(([name, value]) => [name, String(value)]);
}

/** Fields as they were. Returns what has no field. */
export function fill(form: HTMLFormElement, entries: Entries): Entries {
  const fields = [...form.elements].filter((field) => "name" in field && "value" in field) as HTMLInputElement[];
  return entries.filter(([name, value]) => {
    const named = fields.filter((field) => field.name === name);
    for (const field of named) {
      if (field.type !== "checkbox" && field.type !== "radio") field.value = value;
      else if (field.value === value) field.checked = true;
    }
    return named.length === 0;
  });
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
